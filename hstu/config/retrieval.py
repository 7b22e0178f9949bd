"""Knobs of retrieval: the loss, its negatives, and how users are scored against items."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hstu.config.base import UNSET, Args
from hstu.registry import Registry, T

SAMPLED_100 = ":sampled_100"
"""Behind the name of a metric: ranks among 100 random items."""


PAIRWISE_LOSSES = ("bpr", "top1", "top1_max", "bpr_max")
LOSSES = ("sampled_softmax", "full_softmax", "bce", *PAIRWISE_LOSSES)
CUSTOM_LOSSES = Registry("loss", LOSSES)
_OPTIONS = {"bpr_max": {"regularization"}}


def register_loss(name: str) -> Callable[[T], T]:
    """Return a decorator for a retrieval loss of your own, chosen by ``RetrievalArgs.loss = name``.

    What it is put on is called with scores, divided by the temperature, of the positive [L] and of the negatives
    [L, K] of each label token, which of the negatives are some [L, K] bool (one that is the positive is not), and with
    ``loss_options`` by their names; it returns the loss of each token, [L]. Means over ranks are taken by the trainer.

    Args:
        name: Of letters, digits and underscores.

    Raises:
        ValueError: for a name that is taken.
    """
    return CUSTOM_LOSSES.add(name)


@dataclass(frozen=True, kw_only=True)
class RetrievalArgs(Args):
    """Next-item training against sampled or all items, and its evaluation on the whole catalogue.

    ``mol_*`` are those of ``similarity = "mol"`` (https://arxiv.org/abs/2306.04039): a mixture of the dot products
    of ``mol_query_groups`` x ``mol_item_groups`` vectors of ``mol_channels``.
    """

    #: Choose by the size of the data set: batch, epochs, history, width, rates, dropout, temperature and negatives, as
    #: far as they are not set. What was chosen is in the log, and in config.gin of the run.
    sized_by_data: bool = False
    #: "sampled_softmax", "full_softmax"; "bce": binary cross-entropy of the next item and of one item that the user has
    #: not, see bce_excludes; "bpr", "top1", "top1_max", "bpr_max": the next item against each negative of the pools of
    #: sampled_softmax. Or one that is registered, with such negatives.
    loss: str = "sampled_softmax"
    #: What a registered loss is called with, by name; bpr_max has regularization, the weight of squared scores.
    loss_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    #: Negatives per label; -1 takes every negative there is in the batch (in_batch only).
    num_negatives: int = -1
    #: What the negative of bce is never taken from: everything that its user did up to the end of training, as in
    #: SASRec, or the sample ("window") alone.
    bce_excludes: Literal["history", "window"] = "history"
    #: "log_uniform": by rank of popularity in training. "all": every item; with a softmax that is full_softmax.
    #: None: "uniform" when num_negatives is set, else "in_batch".
    sampling_strategy: Literal["uniform", "log_uniform", "in_batch", "all"] = UNSET
    #: Backbones that predict masked items: "masked": hidden ones all at once; "permuted": one after another in a random
    #: order, with those before it in sight (PLM); "replaced": masked, and telling which items a guess replaced (RTD).
    objective: Literal["masked", "permuted", "replaced"] = "masked"
    #: Of "permuted": the longest run of events that is hidden together.
    max_span_length: int = 5
    #: Of "replaced": weight of the binary cross-entropy beside the loss.
    replaced_weight: float = 1.0
    #: Backbones that predict masked items: share of the events that are masked in training.
    mask_probability: float = 0.2
    #: Share of the training samples of which the last event alone is masked, as in evaluation.
    mask_last_probability: float = 0.1
    #: Take the logarithm of how often an item is drawn as a negative off its score in training.
    logq_correction: bool = False
    #: Share of the target that full_softmax spreads over all items.
    label_smoothing: float = 0.0
    #: "dot": items follow NetworkArgs.output_norm. "cosine": both sides of length one. "mol": see above.
    similarity: Literal["dot", "cosine", "mol"] = "dot"
    #: Add a learned number of each item to its dot products, in training, evaluation and predictions.
    item_bias: bool = False
    #: "mol": vectors of a user.
    mol_query_groups: int = 4
    #: "mol": vectors of an item.
    mol_item_groups: int = 4
    #: "mol": width of each.
    mol_channels: int = 16
    #: "mol": inner width of the networks that weigh their products.
    mol_gate_channels: int = 64
    #: "mol": dropout of these weights.
    mol_dropout: float = 0.1
    #: Weight of the mutual information of gate and item, a reward for gates that differ between items.
    mol_mutual_information: float = 0.0
    #: Divides scores in training losses.
    temperature: float = 0.05
    #: Learn the temperature, from that one on and within [0.01, 1] (CLIP, https://arxiv.org/abs/2103.00020).
    learned_temperature: bool = False
    #: Items whose embedding has a larger cosine than this with that of the positive are none of its negatives: another
    #: edition, say; 0.99 in HLLM. None: all are but the positive itself.
    closest_negative: float | None = None
    #: Least length of a vector that is scaled to length one.
    l2_norm_eps: float = 1e-6
    #: HR@k, NDCG@k, MRR: among the whole catalogue. With ":sampled_100" behind it, as in older papers: among 100
    #: random items that the user has not seen; higher, and comparable with such scores only.
    eval_metrics: tuple[str, ...] = ("HR@10", "NDCG@10")
    #: Leave items of the user's whole history out of rankings and predictions; a target among them is then a miss.
    #: None: if at most 1% of the validation targets are such items.
    filter_seen: bool | None = None

    def resolve(self) -> None:
        if self.loss not in ("full_softmax", "bce"):
            self.default(sampling_strategy="in_batch" if self.num_negatives == -1 else "uniform")

    limits: ClassVar = {
        "num_negatives": (-1, 2**24),
        **dict.fromkeys(("mask_probability", "mask_last_probability", "label_smoothing", "mol_dropout"), (0, 1)),
        **dict.fromkeys(("mol_query_groups", "mol_item_groups"), (1, 1024)),
        **dict.fromkeys(("mol_channels", "mol_gate_channels"), (1, 2**14)),
        "mol_mutual_information": (0, 1e6),
        "max_span_length": (1, 2**20),
        "replaced_weight": (0, 1e6),
        "temperature": (1e-6, 1e6),
        "closest_negative": (-1, 1),
        "l2_norm_eps": (1e-20, 1),
        "loss_options": (-(2**62), 2**62),
    }

    def validate(self) -> None:
        self.require_range("mol_dropout", 0, 1)
        self.require_range("label_smoothing", 0, 1)
        if self.num_negatives != -1:
            self.require_positive("num_negatives")
        self._validate_loss()
        if self.learned_temperature and not 0.01 <= self.temperature <= 1:
            raise self.error("temperature", "is where a learned one begins, which stays within [0.01, 1]")
        for name, of in (("max_span_length", "permuted"), ("replaced_weight", "replaced")):
            if self.objective != of and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise self.error(name, f"is of RetrievalArgs.objective = {of!r}, which is {self.objective!r}")
        for metric in self.eval_metrics:
            if not re.fullmatch(rf"((HR|NDCG)@[1-9]\d{{0,8}}|MRR)({SAMPLED_100})?", metric):
                raise self.error(
                    "eval_metrics",
                    f"must be made of HR@k, NDCG@k and MRR, such as 'HR@10', or 'HR@10{SAMPLED_100}' by its own name",
                )
        if not self.eval_metrics:
            raise self.error("eval_metrics", "must name at least one metric")

    def _validate_loss(self) -> None:
        strategy = self.sampling_strategy
        if self.loss not in LOSSES and CUSTOM_LOSSES.get(self.loss) is None:
            known = ", ".join(map(repr, (*LOSSES, *CUSTOM_LOSSES.names)))
            raise self.error("loss", f"must be one of {known}; one of your own is registered by a module that --import "
                             "names")  # fmt: skip
        if self.loss in LOSSES and (unknown := set(self.loss_options) - _OPTIONS.get(self.loss, set())):
            raise self.error("loss_options", f"{min(unknown)!r} is none of {self.loss}; a registered loss has its own")
        if self.loss == "bpr_max" and not _is_weight(self.loss_options.get("regularization", 0)):
            raise self.error("loss_options", "regularization must be a number of at least 0")
        if strategy in ("uniform", "log_uniform") and self.num_negatives == -1:
            raise self.error("num_negatives", f"must be set when RetrievalArgs.sampling_strategy = {strategy!r}")
        if strategy == "all" and self.loss == "sampled_softmax":
            raise self.error("sampling_strategy", "makes it the full softmax; use RetrievalArgs.loss = 'full_softmax'")
        if strategy == "all" and self.num_negatives != -1:
            raise self.error("num_negatives", "must be -1 where RetrievalArgs.sampling_strategy = 'all'")
        if self.loss == "bce" and strategy is not None:
            raise self.error("sampling_strategy", "bce draws one item that the user has not; leave it unset")
        if self.loss != "bce" and self.bce_excludes != "history":
            raise self.error("bce_excludes", f"concerns loss = 'bce' alone, not {self.loss!r}; leave it out")
        if self.loss == "bce" and self.num_negatives not in (-1, 1):
            raise self.error("num_negatives", "bce has one negative; use 1, or sampled_softmax for more")
        if self.label_smoothing and self.loss != "full_softmax":
            raise self.error("label_smoothing", "spreads over all items, which only full_softmax scores")
        if self.logq_correction and self.loss not in LOSSES[:2]:
            raise self.error("logq_correction", f"corrects a sampled softmax, which {self.loss} is not")
        if self.logq_correction and (self.loss != "sampled_softmax" or self.negatives == "uniform"):
            raise self.error("logq_correction", "changes nothing where all items are as probable; use it with in_batch "
                             "or log_uniform negatives")  # fmt: skip
        if self.item_bias and self.similarity != "dot":
            raise self.error("item_bias", f"is a part of dot products; {self.similarity} has none")
        if self.mol_mutual_information and (self.similarity != "mol" or self.loss not in LOSSES[:2]):
            raise self.error("mol_mutual_information", "needs similarity = 'mol' and a softmax loss")

    @property
    def negatives(self) -> Literal["all", "uniform", "log_uniform", "in_batch"]:
        """Where negatives come from."""
        if self.loss == "full_softmax":
            return "all"
        return "uniform" if self.loss == "bce" else self.sampling_strategy

    @property
    def needs_item_counts(self) -> bool:
        """Whether negatives depend on how often items are labels."""
        return self.logq_correction or self.negatives == "log_uniform"


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
