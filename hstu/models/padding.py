"""The dense part of a step in slots of fixed sizes, so that what is recorded of one batch can be replayed on others.

Rows behind those of the batch are nobody's: their vectors are zeros, tokens of them stand in short sequences of their
own behind all samples, and labels among them count nothing. So they change no loss and no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.data.batch import POOL, Batch, keyed_features
from hstu.layers.tokens import Stream
from hstu.models.lookup import Lookup, RetrievalLookup
from hstu.models.masked import MaskedRetrievalModel
from hstu.models.negatives import POOL_SIZE
from hstu.models.ranking import RankingModel
from hstu.models.retrieval import RetrievalModel
from hstu.ops import Layout

_LEAST = 16  # rows by which slots grow at least
_TOGETHER = 64  # padding tokens in a sequence: few enough that their attention is next to nothing
_NOBODY = -1  # an item
_UNKNOWN = 2**40  # a class beyond those of every task
ROWS, _AT, _TARGET = "rows/", "at/", "target/"  # before the names of features


def slot_size(rows: int) -> int:
    """Return a size above ``rows``: 16, 32, .. 128, 160, .. 256, 320, .., four from each power of two to the next."""
    return -(-(rows + 1) // _step(rows + 1)) * _step(rows + 1)


def _step(size: int) -> int:
    """Return what lies between slots of about ``size`` rows."""
    return max(_LEAST, 1 << max(0, (size - 1).bit_length() - 3))


class Slot(NamedTuple):
    """A tensor [n, ..] and what it stands in.

    Attributes:
        tensor: Of the batch.
        size: Rows of the slot, at least n.
        filler: What stands in rows that are nobody's.
        spread: Not zero: places 0 .. ``spread`` - 1 in turn stand there, for rows that are read and do not count; equal
            ones would be summed one after another in the backward pass.
    """

    tensor: Tensor
    size: int
    filler: float = 0
    spread: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """[size, ..]."""
        return self.size, *self.tensor.shape[1:]

    def padding(self) -> Tensor:
        """Return what stands in the slot before the tensor does, [size, ..]."""
        if self.spread:
            places = torch.arange(torch.Size(self.shape).numel(), device=self.tensor.device) % self.spread
            return places.view(self.shape)
        return self.tensor.new_full(self.shape, self.filler)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the dense part depends on beside its tensors, the same for all batches in slots of one size.

    Attributes:
        is_retrieval: Whether labels are told apart from a pool.
        item: Item feature.
        tokens_per_event: See ``Stream``.
        longest: Bound on the tokens of a sample.
        padding: The most tokens of padding, which are one at least.
        is_stocked: Whether the whole slot of the pool holds items, or ``columns`` choose from it.
    """

    is_retrieval: bool
    item: str
    tokens_per_event: int
    longest: int
    padding: int
    is_stocked: bool


Key = tuple[Facts, tuple[tuple[str, tuple[int, ...], torch.dtype], ...]]


@dataclass(frozen=True, kw_only=True)
class DenseInputs:
    """All that the loss of a batch depends on, beside the weights.

    Attributes:
        slots: By name.
        facts: The rest.
    """

    slots: dict[str, Slot]
    facts: Facts

    @property
    def key(self) -> Key:
        """Equal for batches of which one may stand in the slots of the other."""
        return self.facts, tuple((name, slot.shape, slot.tensor.dtype) for name, slot in self.slots.items())


def why_not_padded(model: RankingModel | RetrievalModel) -> str | None:
    """Return what of ``model`` depends on numbers that no slot holds; None: nothing."""
    features = model.feature_tokens
    if model.item_encoder is not None:
        return "items are made of features or texts"
    if features.merges or {f.name for f in features.users.features} - {*features.contexts}:
        return "events or users have declared features"
    return "items are masked" if isinstance(model, MaskedRetrievalModel) else None


def dense_inputs(model: RankingModel | RetrievalModel, found: Mapping[str, Tensor], request: Lookup) -> DenseInputs:
    """Return what the loss of ``request`` depends on, for a model of which ``why_not_padded`` says nothing.

    Args:
        model: Whose loss it is.
        found: Rows of the tables.
        request: All of its tokens are local.
    """
    stream, batch, layout = request.stream, request.batch, request.stream.layout
    assert stream.local is None
    tokens, events, labels = (slot_size(x.numel()) for x in (stream.timestamps, stream.event_rows, batch.labels))
    is_retrieval = isinstance(request, RetrievalLookup)
    slots = {
        "offsets": _whole(layout.offsets),
        "event_rows": Slot(stream.event_rows, events, tokens - 1),
        "rows": Slot(request.rows, labels, spread=tokens),
        "labels": Slot(batch.labels, labels, _NOBODY if is_retrieval else _UNKNOWN),
    }
    of_samples = {"num_context": layout.num_context, "num_candidates": layout.num_candidates}
    if stream.memory is not None:
        of_samples |= {"memory_rows": stream.memory[0], "memory_tokens": stream.memory[1]}
    slots |= {name: _whole(x) for name, x in of_samples.items() if x is not None}
    of_tokens = {name: getattr(layout, name) for name in ("timestamps", "segments", "is_memory")}
    of_tokens["positions"] = stream.positions
    slots |= {name: Slot(x, tokens) for name, x in of_tokens.items() if x is not None}
    for name, places in stream.feature_rows.items():
        # A sample has one of each context; the rest is behind the last token, for a slot is never full.
        size = places.numel() if name in model.feature_tokens.contexts else slot_size(places.numel())
        slots[_AT + name], slots[ROWS + name] = Slot(places, size, tokens - 1), Slot(found[name], size)
    is_stocked = True
    if isinstance(request, RetrievalLookup):
        assert isinstance(model, RetrievalModel)
        number = request.pool_ids.numel()
        pool = number if number in (model.num_items, POOL_SIZE) else slot_size(number)
        is_stocked = pool == number or request.columns is not None
        slots["pool_ids"], slots[ROWS + POOL] = Slot(request.pool_ids, pool, _NOBODY), Slot(found[POOL], pool)
        slots["targets"] = Slot(request.targets, labels, spread=events)
        if request.columns is not None:
            slots["columns"] = Slot(request.columns, labels, spread=pool)
        if request.live is not None:
            slots["live"] = Slot(request.live, labels)
    else:
        slots["label_events"] = Slot(batch.label_events, labels, events - 1)
        for name, values in batch.targets.items():
            slots[_TARGET + name] = Slot(values, events, torch.nan if values.is_floating_point() else _UNKNOWN)
    facts = Facts(
        is_retrieval=is_retrieval,
        item=batch.item,
        tokens_per_event=stream.tokens_per_event,
        longest=layout.longest,
        padding=_step(tokens),
        is_stocked=is_stocked,
    )
    return DenseInputs(slots=slots, facts=facts)


def _whole(tensor: Tensor) -> Slot:
    return Slot(tensor, tensor.shape[0])


def in_slots(values: Mapping[str, Tensor], facts: Facts) -> tuple[dict[str, Tensor], Lookup]:
    """Return the rows of the tables, and a lookup of which only what the loss reads is there.

    Nothing of it depends on numbers in host memory but those of ``facts`` and the sizes of ``values``.

    Args:
        values: What stands in the slots of :func:`dense_inputs`, by their names.
        facts: Of the same.
    """
    found = {name.removeprefix(ROWS): rows for name, rows in values.items() if name.startswith(ROWS)}
    none = values["labels"][:0]
    batch = Batch(
        features=keyed_features([], none, none, []),
        item=facts.item,
        label_events=values.get("label_events", none),
        labels=values["labels"],
        num_candidates=none,
        timestamps=none,
        users=none,
        sample_ids=none,
        step=0,
        targets={name.removeprefix(_TARGET): x for name, x in values.items() if name.startswith(_TARGET)},
    )
    given = dict(batch=batch, values=batch, stream=_stream(values, facts), rows=values["rows"])
    if not facts.is_retrieval:
        return found, Lookup(**given)  # type: ignore[arg-type]
    return found, RetrievalLookup(
        **given,  # type: ignore[arg-type]
        targets=values["targets"],
        pool_ids=values["pool_ids"],
        columns=values.get("columns"),
        live=values.get("live"),
        counted=values["labels"] != _NOBODY,
        stocked=None if facts.is_stocked else values["pool_ids"] != _NOBODY,
    )


def _stream(values: Mapping[str, Tensor], facts: Facts) -> Stream:
    """Return the tokens, those of padding in short sequences behind the others."""
    offsets, tokens = values["offsets"], values["timestamps"].shape[0]
    together = max(1, min(_TOGETHER, facts.longest))
    more = -(-facts.padding // together)
    ends = offsets[-1] + together * torch.arange(1, more + 1, device=offsets.device)
    none_there = {name: F.pad(values[name], (0, more)) for name in ("num_context", "num_candidates") if name in values}
    layout = Layout(
        torch.cat([offsets, ends.clamp(max=tokens)]),
        max_seqlen=facts.longest,
        segments=values.get("segments"),
        is_memory=values.get("is_memory"),
        timestamps=values["timestamps"],
        **none_there,
    )
    return Stream(
        layout=layout,
        event_rows=values["event_rows"],
        tokens_per_event=facts.tokens_per_event,
        feature_rows={name.removeprefix(_AT): places for name, places in values.items() if name.startswith(_AT)},
        memory=(values["memory_rows"], values["memory_tokens"]) if "memory_rows" in values else None,
        positions=values.get("positions"),
    )
