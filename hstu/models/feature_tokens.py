"""Features of events and users in the token stream: events' join their item or action, users' are tokens in front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from hstu.config import Config
from hstu.data.batch import Batch, KeyedJaggedTensor, keyed_features
from hstu.data.schema import Schema
from hstu.layers.feature_encoders import pool_sets
from hstu.layers.tokens import Stream
from hstu.models.binding import MERGED_CONTEXT, Inputs
from hstu.models.features import FeatureEncoders, make_merge, part_widths
from hstu.models.negatives import random_bits, random_uniform
from hstu.ops import lengths_to_offsets, sequences_and_positions

_NOISE = 2**47  # with the number of the feature, beside the seeds of other draws


class FeatureTokens(nn.Module):
    """Turns the features of events and users into what the tokens hold.

    Args:
        config: The run.
        schema: The data set.
        inputs: What the model reads.
        widths: Of the rows of each key that is looked up.
    """

    def __init__(self, config: Config, schema: Schema, inputs: Inputs, widths: Mapping[str, int]) -> None:
        super().__init__()
        args, network, declared = config.feature, config.network, inputs.declared
        self.item, self.action, self.contexts = inputs.item, inputs.action, inputs.contexts
        self.seed, self.swap_rate, self.unknown_rate = config.trainer.seed, args.swap_rate, args.unknown_rate
        self.noisy = tuple(f for f in (*declared.events, *declared.outcomes) if f.kind == "categorical")
        if network.is_masked and self.noisy and args.swap_rate:
            raise args.error("swap_rate", f"could show what {network.backbone} is to predict at another event; use 0, "
                             "or FeatureArgs.event_features = ()")  # fmt: skip
        std, merging = network.embedding_initializer_std, args.merge

        def encoders(features: tuple, added_to: int | None) -> FeatureEncoders:
            own = part_widths(features, config, schema, added_to)
            return FeatureEncoders(features, {n: widths.get(n, width) for n, width in own.items()}, args, std)

        item, action = network.item_embedding_dim, network.action_embedding_dim
        in_tokens = args.context_merge == "tokens"
        self.users = encoders(declared.users, network.contextual_embedding_dim if in_tokens else None)
        self.events = encoders(declared.events, item if merging == "sum" else None)
        self.outcomes = encoders(declared.outcomes, action if merging == "sum" else None)
        self.merges = nn.ModuleDict()
        if declared.users and not in_tokens:
            self.merges["users"] = make_merge("concat", self.users, None, network.contextual_embedding_dim, args)
        if declared.events:
            self.merges["events"] = make_merge(merging, self.events, (inputs.item, item), item, args)
        if declared.outcomes and inputs.action is not None:
            self.merges["outcomes"] = make_merge(merging, self.outcomes, (inputs.action, action), action, args)
        #: Width of the vectors of each token feature.
        self.widths = {inputs.item: item} | ({} if inputs.action is None else {inputs.action: action})
        own = self.users.widths if in_tokens else {MERGED_CONTEXT: network.contextual_embedding_dim}
        self.widths |= {name: own[name] for name in inputs.contexts}

    @property
    def names(self) -> tuple[str, ...]:
        """Token features: contexts in their order, item, action."""
        return *self.contexts, self.item, *([self.action] if self.action else [])

    @property
    def _single(self) -> tuple[str, ...]:
        """Contexts whose token is the one id of a feature, looked up under its name."""
        return tuple(f.name for f in self.users.features if f.kind == "categorical" and f.name in self.contexts)

    def lengths(self, batch: Batch, *, has_context: bool = True) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return how many tokens of each token feature a sample has, [B] int64, and their sums, known on the host.

        Args:
            batch: The batch.
            has_context: Whether the features of its users have tokens.
        """
        sizes = dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))
        whole, each = {*self.contexts} - {*self._single}, int(has_context)
        one = torch.full_like(batch.num_candidates, each)
        return (
            {name: one if name in whole else batch.lengths(name) for name in self.names},
            {name: each * batch.num_samples if name in whole else sizes[name] for name in self.names},
        )

    def values(self, batch: Batch, stream: Stream) -> Batch:
        """Return what the local tokens are made of: ids to look up, numbers, and lengths of sets, of users' also."""
        if self.training and self.noisy and (self.swap_rate or self.unknown_rate):
            batch = replace(batch, features=self._with_noise(batch))
        users = [f.name for f in self.users.features if f.name in batch.features.keys()]  # noqa: SIM118
        sets = batch.set_lengths | {name: batch.lengths(name) for name in users if name not in self._single}
        if stream.local is None:
            return replace(batch, set_lengths=sets)
        local = {name: stream.is_local(name) for name in self.names}
        # Which entries of each feature belong to a local token: of samples, or of events.
        tokens = {f.name: f.name if f.name in local else MERGED_CONTEXT for f in self.users.features}
        of = {name: local[token] for name, token in tokens.items()}
        if any(token not in self._single and local[token].numel() == 0 for token in tokens.values()):
            nobody = torch.zeros_like(batch.num_candidates, dtype=torch.bool)  # in a part of samples without context
            of |= {name: nobody for name, token in tokens.items() if token not in self._single}
        of |= {f.name: local[self.item] for f in self.events.features}
        if self.action is not None:
            history = self._is_history(batch)
            outcomes = torch.zeros_like(history).masked_scatter(history, local[self.action])
            of |= {f.name: outcomes for f in self.outcomes.features}
            of[self.action] = local[self.action]
        of[self.item] = local[self.item]
        kept = {
            name: of[name].repeat_interleave(sets[name], output_size=size) if name in sets else of[name]
            for name, size in zip(batch.features.keys(), batch.features.length_per_key(), strict=True)
        }
        return replace(
            batch.only(kept),
            set_lengths={name: own[of[name]] for name, own in sets.items()},
            numbers={name: own[of[name]] for name, own in batch.numbers.items()},
        )

    def forward(self, embedded: Mapping[str, Tensor], values: Batch, stream: Stream) -> dict[str, Tensor]:
        """Return the vectors of the local tokens of each token feature, [n, width].

        Args:
            embedded: [n, width] of each key of ``values``, items as the one vector of each.
            values: From :meth:`values`.
            stream: Of the batch.
        """
        out = self._of_users(embedded, values) | {self.item: embedded[self.item]}
        if "events" in self.merges:
            parts = self.events(embedded, values.set_lengths, values.numbers)
            out[self.item] = self.merges["events"]({self.item: embedded[self.item], **parts})
        if self.action is not None:
            out[self.action] = embedded[self.action]
        if "outcomes" in self.merges and self.action is not None:
            parts = self.outcomes(embedded, values.set_lengths, values.numbers)
            if stream.local is None:  # candidates have no action
                places = self._history(values)
                parts = {name: own.index_select(0, places) for name, own in parts.items()}
            out[self.action] = self.merges["outcomes"]({self.action: embedded[self.action], **parts})
        return out

    def _of_users(self, embedded: Mapping[str, Tensor], values: Batch) -> dict[str, Tensor]:
        if "users" not in self.merges:
            return self.users(embedded, values.set_lengths, values.numbers)
        categorical = [
            f.name for f in self.users.features if f.kind == "categorical"
        ]  # of nobody, where none are asked
        rows = {name: pool_sets(embedded[name], values.set_lengths[name], "sum") for name in categorical}
        parts = self.users({**embedded, **rows}, values.set_lengths, values.numbers)
        return {MERGED_CONTEXT: self.merges["users"](parts)}

    def _is_history(self, batch: Batch) -> Tensor:
        """Return which events are no candidates, [E] bool."""
        offsets = lengths_to_offsets(batch.lengths(self.item))
        owner, place = sequences_and_positions(offsets, batch.num_events)
        return place < (batch.lengths(self.item) - batch.num_candidates)[owner]

    def _history(self, batch: Batch) -> Tensor:
        """Return the event of each action, [actions] int64."""
        assert self.action is not None
        sizes = dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))
        own, total = lengths_to_offsets(batch.lengths(self.action)), sizes[self.action]
        first = lengths_to_offsets(batch.lengths(self.item))[:-1]
        sequence, place = sequences_and_positions(own, total)
        return first[sequence] + place

    def _with_noise(self, batch: Batch) -> KeyedJaggedTensor:
        """Return the ids of ``batch``, some of events swapped for that of an event before in the sample, or lost.

        Which ones is a function of seed and sample; a later event would show what is to be predicted.
        """
        names, sizes = [*batch.features.keys()], [*batch.features.length_per_key()]
        values = dict(zip(names, batch.features.values().split(sizes), strict=True))
        offsets = lengths_to_offsets(batch.lengths(self.item))
        owner, place = sequences_and_positions(offsets, batch.num_events)
        keys = batch.sample_ids[owner] * 2**20 + place
        for number, feature in enumerate(self.noisy):
            ids, seed, unknown = values[feature.name], self.seed + _NOISE + 2 * number * 2**40, feature.vocab_size or 0
            source = offsets[owner] + random_bits(keys, 1, seed).squeeze(1) % (place + 1)
            swapped, lost = random_uniform(keys, 2, seed + 2**40).unbind(1)
            known = torch.where((swapped < self.swap_rate) & (ids < unknown), ids[source], ids)
            values[feature.name] = torch.where(lost < self.unknown_rate, unknown, known)
        lengths = batch.features.lengths().view(len(names), -1)
        return keyed_features(names, torch.cat([*values.values()]), lengths, sizes)
