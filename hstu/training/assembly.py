"""A config and a data set to a model on this mesh, with what feeds and scores it: what training and inference share."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hstu.config import Config
from hstu.data.loader import BatchLoader
from hstu.data.reader import SequenceDataset
from hstu.data.seen import met_categories, met_contexts, met_values, trained_items
from hstu.data.splits import Split, make_splits
from hstu.models import RetrievalModel, build_model, fit_to_data, make_collator
from hstu.models.binding import model_inputs
from hstu.models.features import table_of
from hstu.models.item_text import make_item_text
from hstu.models.negatives import count_items
from hstu.parallel import Mesh, parallelize
from hstu.parallel.balance import balance, sample_costs
from hstu.training.checkpoint import model_identity
from hstu.training.evaluate import Scorer, best_possible, decide_filter_seen, evaluate
from hstu.training.hardware import on_device
from hstu.training.item_text import keep_text_model, make_vectors, starting_rows
from hstu.training.memory import require_memory
from hstu.training.met import Met
from hstu.training.vocabularies import describe_vocabularies, embedded_features
from hstu.training.watchdog import beat


class Assembly:
    """One model on one data set, its weights not trained.

    Args:
        config: The run.
        dataset: The data.
        mesh: The ranks.

    Attributes:
        config: The run as these devices and this data set compute it.
        notes: Lines about what was asked for and is computed otherwise.
        filtering: Why seen items are left out or not; None of ranking.
        mesh: The ranks, by the degrees of ``config``.
        loaders: Samples of each split.
        met: Of features that tell unknown values from others, which ids the training of the weights meets or has met.
        vocabularies: What the ids of the model stand for, see ``describe_vocabularies``.
        parallel: The model on the mesh.
        text_content: What tells the language model of items from others; None without one.

    Raises:
        ConfigError: if config and data do not fit together.
    """

    def __init__(self, config: Config, dataset: SequenceDataset, mesh: Mesh) -> None:
        config, self.notes = on_device(config, mesh.device)
        mesh = mesh.with_degrees(
            config.context_parallel.context_parallel_size, config.tensor_model_parallel.tensor_model_parallel_size
        )
        splits = make_splits(config.dataset, dataset, config.recent_targets)
        self.config, self.filtering = _resolved(config, dataset, mesh, splits["valid"])
        self.dataset, self.mesh = dataset, mesh
        self.text_content: str | None = None
        self._trained_before: torch.Tensor | None = None
        self._load(splits)
        self._build()

    def _load(self, splits: dict[str, Split]) -> None:
        config, dataset, mesh = self.config, self.dataset, self.mesh
        args = config.trainer
        without_loss = dataset.action_ids(config.dataset.actions_without_loss)
        collate = replace(make_collator(config, dataset.schema), actions_without_loss=without_loss)
        self.met = met_contexts(dataset, splits["train"], collate.contexts) if config.feature.unknown_rate else {}
        values = met_values(dataset, splits["train"], collate) if config.feature.unknown_rate else {}
        collate = replace(collate, met=dict(self.met), met_values=values)
        self.met |= values
        self.loaders = {
            name: BatchLoader(
                dataset=dataset,
                split=split,
                collate=collate,
                batch_size=args.train_batch_size if name == "train" else args.eval_batch_size,
                rank=mesh.data.rank,
                world_size=mesh.data.size,
                micro_batches=args.gradient_accumulation_steps if name == "train" else 1,
                drop_last=config.dataset.drop_last and name == "train",
                seed=args.seed,
                shuffle=config.dataset.shuffle and name == "train",
                num_workers=config.dataset.num_workers,
                pin_memory=mesh.device.type == "cuda",
                balance=self._balance if args.enable_balanced_shuffler else None,
            )
            for name, split in splits.items()
        }

    def _build(self) -> None:
        config, dataset, mesh = self.config, self.dataset, self.mesh
        require_memory(config, dataset.schema, mesh, self.loaders["train"])
        model = build_model(config, dataset.schema, allocate_tables=False)
        if model.item_encoder is not None:
            if config.feature.unknown_rate:
                self.met |= met_categories(dataset, self._trained_here)
            model.item_encoder.read(dataset, self.met or None)
            if (text := model.item_encoder.text) is not None:
                text.tick = beat
                self.text_content = mesh.on_main(lambda: text.content(of_run=True))
                if config.item_text.freeze:
                    make_vectors(text, dataset.path, mesh)
        if config.retrieval is not None and config.retrieval.needs_item_counts:
            assert isinstance(model, RetrievalModel)
            model.sampler.set_counts(count_items(dataset, self.loaders["train"].split).to(mesh.device))
        names = embedded_features(config, model, dataset.schema)
        self.vocabularies = mesh.on_main(lambda: describe_vocabularies(dataset.vocabularies, names))
        self.parallel = parallelize(model, mesh, config)
        self.model = self.parallel.model

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and this model beside the ids, as JSON values."""
        identity = model_identity(self.config)
        return (
            identity if self.text_content is None else identity | {"ItemTextArgs.model (contents)": self.text_content}
        )

    def start_rows(self) -> None:
        """Let the rows of items start from their texts, if that is asked for; before the first step."""
        config, mesh = self.config, self.mesh
        if config.item_text.use != "start":
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.trainer.seed)
            text = make_item_text(config, self.dataset.schema)
        text.read(self.dataset)
        make_vectors(text, self.dataset.path, mesh)
        rows = starting_rows(text, config.network.item_embedding_dim, config.network.embedding_initializer_std, mesh)
        item, tables = self.dataset.schema.item.name, self.parallel.tables
        tables.tables = tuple(replace(t, start=rows) if t.name == item else t for t in tables.tables)
        tables.fill()
        tables.forget_cached_rows()
        tables.tables = tuple(replace(t, start=None) for t in tables.tables)

    def keep_text_model(self, run: Path) -> None:
        """Keep in the directory ``run`` what answers need of the language model of items, if there is one."""
        text = None if self.model.item_encoder is None else self.model.item_encoder.text
        content = self.text_content
        if text is not None and content is not None:
            self.mesh.on_main(lambda: keep_text_model(text, content, run))

    @cached_property
    def _trained_here(self) -> torch.Tensor:
        loader = self.loaders["train"]
        return trained_items(self.dataset, loader.split, loader.collate)

    @property
    def trained_items(self) -> torch.Tensor:
        """Which items training shows or has shown, in a history or to be predicted, [items] bool in host memory."""
        return self._trained_here if self._trained_before is None else self._trained_here | self._trained_before

    def every_met(self) -> Met:
        """Return all that is to be known of what the training of the weights has met, as ``also_met`` takes it."""
        return self.met | {self.dataset.schema.item.name: self.trained_items.numpy()}

    def also_met(self, before: Met) -> None:
        """Count ids as met that the training of the weights has met before this data set, or this part of it."""
        for name in self.met.keys() & before.keys():
            number = min(len(self.met[name]), len(before[name]))  # one of them may have a place for unknown values
            self.met[name][:number] |= before[name][:number]  # in place: it is what the loaders hold
        if (items := before.get(self.dataset.schema.item.name)) is not None:
            self._trained_before = torch.from_numpy(items[: self.dataset.schema.item.vocab_size].copy())
        if self.model.item_encoder is not None:
            self.model.item_encoder.read_features(self.dataset, self.met)

    @property
    def tables_of(self) -> dict[str, str]:
        """The table whose rows the ids of each feature that the model reads have."""
        schema = self.dataset.schema
        features = model_inputs(self.config, schema).declared.every
        return {f.name: table_of(f, self.config.feature, schema) for f in features}

    def score(self, split: str, step: int, scorer: Scorer | None = None) -> dict[str, Any]:
        """Return the evaluation record of ``split``, the same on every rank; ``step`` is on record.

        ``scorer`` is what scores in place of the model.
        """
        trained = self.trained_items if self.config.dataset.protocol in ("temporal", "windows") else None
        record = evaluate(scorer or self.model, self.loaders[split], self.mesh, self.config, step, trained)
        beat()
        if self.filtering is not None:
            record["filter_seen_reason"] = self.filtering
        best = best_possible(record, self.dataset.schema.best_possible)
        return record if best is None else record | {"best_possible": best}

    def _balance(self, events: np.ndarray, ranks: int) -> list[np.ndarray]:
        per_event = 2 if self.config.network.token_layout == "interleave" else 1
        tokens = events * per_event + self.config.memory.num_memory_tokens
        return balance(sample_costs(tokens, self.config.network), ranks)


def _resolved(config: Config, dataset: SequenceDataset, mesh: Mesh, valid: Split) -> tuple[Config, str | None]:
    """Return ``config`` with what only the data can decide, and the reason for filter_seen."""
    config = fit_to_data(config, dataset.schema)
    if config.retrieval is None:
        return config, None
    chosen, reason = mesh.on_main(lambda: decide_filter_seen(config, dataset, valid))
    return replace(config, retrieval=replace(config.retrieval, filter_seen=chosen)), reason
