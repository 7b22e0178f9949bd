"""Generative ranking: what a user does with an item, from everything before it."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.config import Config
from hstu.data.batch import Batch
from hstu.data.schema import Schema
from hstu.layers.mlp import MLP, initialize
from hstu.models.encoder import Encoder
from hstu.models.lookup import Lookup
from hstu.models.losses import LossSum
from hstu.models.tasks import make_tasks, ranking_loss


class RankingModel(Encoder):
    """Embeddings, preprocess, backbone, postprocess, multi-task head, loss.

    Raises:
        ConfigError: if head and tasks do not fit the data set.
    """

    def __init__(self, config: Config, schema: Schema, *, allocate_tables: bool = True) -> None:
        super().__init__(config, schema, allocate_tables=allocate_tables)
        assert config.ranking is not None
        args = config.ranking
        self.tasks = make_tasks(config, schema)
        self.action = schema.action.name if schema.action else None
        self.head = MLP(
            config.network.hidden_size,
            args.prediction_head_arch,
            activation=args.prediction_head_act_type,
            bias=args.prediction_head_bias,
        )
        initialize(self.head, "xavier_uniform", 0.0)
        tables = {feature.name: feature.table or feature.name for feature in schema.features}
        classes = tuple(tables[task.feature] for task in self.tasks if task.kind == "multiclass")
        if len(self.tasks) > 1:
            self.class_features = classes
        elif classes:
            last = len(self.head.layers) - 1
            names = (name for name, _ in self.head.layers[last].named_parameters())
            self.row_weights = {f"head.layers.{last}.{name}": classes[0] for name in names}

    def request(self, batch: Batch) -> Lookup:
        stream = self.lay_out(batch)
        labelled, rows = self.local_labels(batch, stream, batch.label_events)
        return Lookup(batch=labelled, stream=stream, rows=rows, values=self.values(batch, stream))

    def scoring_request(self, batch: Batch) -> Lookup:
        return self.request(batch)

    def loss(self, found: dict[str, Tensor], request: Lookup) -> LossSum:
        return ranking_loss(self._logits(found, request), self.targets(request.batch), self.tasks)

    def logits(self, request: Lookup) -> Tensor:
        """Return the outputs of the head for the labelled events, [L, outputs of all tasks] float32."""
        return self._logits(self.embeddings(request.features), request)

    def predictions(self, request: Lookup) -> Tensor:
        """Return probabilities and numbers of the labelled events, [L, outputs of all tasks] float64."""
        embedded = self.join(self.embeddings(request.features), request.values)
        return self.predictions_of(self.encode(embedded, request))

    def predictions_of(self, rows: Tensor) -> Tensor:
        """Return the predictions of hidden rows [L, D], [L, outputs of all tasks] float64."""
        parts = self.head(rows).double().split([task.outputs for task in self.tasks], 1)
        return torch.cat([task.predict(part) for task, part in zip(self.tasks, parts, strict=True)], 1)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the tasks predict of the labelled events, [L] of each feature."""
        own = {} if self.action is None else {self.action: batch.labels}
        return own | {name: values[batch.label_events] for name, values in batch.targets.items()}

    def _logits(self, found: dict[str, Tensor], request: Lookup) -> Tensor:
        out: Tensor = self.head(self.encode(self.join(found, request.values), request))
        return out
