"""Knobs of item text: the language model that reads it, and where its vectors go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hstu.config.base import UNSET, Args

TEXT_WEIGHTS = "item_encoder.text.model."
"""Prefix of the weights of the language model."""


@dataclass(frozen=True, kw_only=True)
class ItemTextArgs(Args):
    """A HuggingFace encoder or decoder that reads the texts of items (HLLM, https://arxiv.org/abs/2409.12740).

    Its vector of an item joins the item's row and features wherever the item stands, as NetworkArgs.item_embedding
    says: "both" has rows of items beside it, "categorical" none.
    """

    #: Directory of a model: config.json, tokenizer and weights; or a config.json with a tokenizer beside it. None: no
    #: text is read.
    model: str | None = None
    #: Weights in that directory, or random ones, drawn from the seed of the run.
    init: Literal["pretrained", "random"] = "pretrained"
    #: Columns of the items that are read, each as "name: value", in this order: declared as text, categorical or multi.
    #: None: all that are text.
    columns: tuple[str, ...] | None = None
    #: In front of each text.
    prompt: str = ""
    #: Tokens that a text is cut to, the prompt and the tokenizer's own tokens among them.
    max_tokens: int = 64
    #: What stands for a text: "token": the hidden state of a learned token behind it; "mean": of all its hidden states.
    #: None: "mean" of a frozen model, "token" of a trained one.
    pooling: Literal["token", "mean"] = UNSET
    #: "vector": the item's vector is made of it. "start": the rows of items start from it, and the model is not needed
    #: any more.
    use: Literal["vector", "start"] = "vector"
    #: Leave the model as it is: vectors are computed once and kept beside the data set. False: it learns.
    freeze: bool = True
    #: Times OptimizerArgs.learning_rate, of a model that learns.
    learning_rate_factor: float = 1.0
    #: Tokens that it reads at once; whoever trains one keeps the activations of so many.
    micro_batch_tokens: int = 16_384

    limits: ClassVar = {
        "max_tokens": (1, 2**20),
        "micro_batch_tokens": (1, 2**31),
        "learning_rate_factor": (0, 1e6),
    }

    def resolve(self) -> None:
        if self.model is not None:
            self.default(pooling="mean" if self.freeze else "token")

    def validate(self) -> None:
        if self.model is None:
            for name, field in self.__dataclass_fields__.items():
                if getattr(self, name) != field.default:
                    raise self.error(name, "needs ItemTextArgs.model, the directory of a language model")
            return
        if not self.model.strip():
            raise self.error("model", "must name a directory; use None for no text")
        if self.columns is not None and not self.columns:
            raise self.error("columns", "must name a column; None takes all that are text")
        if self.freeze and self.pooling == "token":
            raise self.error("pooling", "a frozen model learns no token; use 'mean', or ItemTextArgs.freeze = False")
        if self.freeze and self.learning_rate_factor != 1:
            raise self.error("learning_rate_factor", "a frozen model does not learn; leave it out")
        if self.use == "start" and not self.freeze:
            raise self.error("use", "rows start from a model that stays as it is; use ItemTextArgs.freeze = True")

    @property
    def is_vector(self) -> bool:
        """Whether the vector of an item is made of its text."""
        return self.model is not None and self.use == "vector"
