"""Generative ranking: the action a user takes on an item, from everything before it."""

from __future__ import annotations

from torch import Tensor

from hstu.config import Config, ConfigError
from hstu.data.batch import Batch
from hstu.data.schema import Schema
from hstu.layers.mlp import MLP, initialize
from hstu.models.encoder import Encoder
from hstu.models.losses import LossSum, ranking_loss


class RankingModel(Encoder):
    """Embeddings, preprocess, backbone, postprocess, multi-task head, loss.

    Raises:
        ConfigError: if the head does not fit the data set's actions.
    """

    def __init__(self, config: Config, schema: Schema, *, allocate_tables: bool = True) -> None:
        super().__init__(config, schema, allocate_tables=allocate_tables)
        assert config.ranking is not None
        args = config.ranking
        check_actions(config, schema)
        self.multiclass = args.is_multiclass
        self.head = MLP(
            config.network.hidden_size,
            args.prediction_head_arch,
            activation=args.prediction_head_act_type,
            bias=args.prediction_head_bias,
        )
        initialize(self.head, "xavier_uniform", 0.0)
        if self.multiclass and schema.action is not None:
            last = len(self.head.layers) - 1
            names = (name for name, _ in self.head.layers[last].named_parameters())
            self.row_weights = {f"head.layers.{last}.{name}": schema.action.name for name in names}

    def logits(self, batch: Batch) -> Tensor:
        """Return the scores of the labelled events, [L, K] float32, K classes or binary tasks."""
        rows = self.encode(self.look_up(batch), batch)
        out: Tensor = self.head(rows)
        return out

    def forward(self, batch: Batch) -> LossSum:
        """Return the loss of the labelled events."""
        return ranking_loss(self.logits(batch), self.local_labels(batch).labels, multiclass=self.multiclass)


def check_actions(config: Config, schema: Schema) -> None:
    """Raise ``ConfigError`` unless the prediction head can express the actions of ``schema``."""
    assert config.ranking is not None
    args, action = config.ranking, schema.action
    if action is None:
        raise ConfigError("DatasetArgs.dataset_name", f"= {schema.name!r}: has no actions, so nothing can be ranked")
    outputs, classes = args.prediction_head_arch[-1], action.vocab_size or 0
    if args.is_multiclass:
        if action.action_type == "bitmask":
            raise args.error(
                "num_tasks", f"{schema.name!r} has bit-mask actions; use num_tasks = {outputs}, one per bit"
            )
        if outputs < classes:
            raise args.error("prediction_head_arch", f"{schema.name!r} has {classes} classes of actions; end with that")
    elif classes > 2**outputs:
        raise args.error("prediction_head_arch", f"{schema.name!r} has actions up to {classes - 1}, more than "
                         f"{outputs} binary task(s) can hold; end with {(classes - 1).bit_length()} tasks or "
                         f"{classes} classes and num_tasks = 1")  # fmt: skip
