"""Keys and values of tokens that a backbone has run over, so that later tokens attend to them without a second pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hstu.layers.tokens import Tokens
from hstu.ops import Layout, Mask, lengths_to_offsets, positions_in_sequence, sequence_ids, sequences_and_positions

HIDDEN_SEGMENT = -1  # of places that hold nothing


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What B samples leave behind for tokens that come after.

    Tokens that nobody later may attend to, as events that memory stands for, are not kept.

    Attributes:
        layout: Of the tokens kept; no candidates.
        places: [T] int64, place of each of them in its sample.
        lengths: [B] int64, tokens of each sample that the cache stands for: what comes next stands at this place.
        timeless: [B] bool, samples without an event so far: their tokens take the time of the first one to come.
        layers: Keys [T, H, d_qk] and values [T, H, d_v] of each layer.
        given: What tokens depend on beside those before them, each [B] int64; whoever made the cache compares it.
    """

    layout: Layout
    places: Tensor
    lengths: Tensor
    timeless: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]
    given: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """B."""
        return self.layout.num_samples

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)

    @staticmethod
    def joined(caches: Sequence[Cache]) -> Cache:
        """Return the caches of all samples of ``caches``, one after the other; at least one, all of one model."""
        layouts = [cache.layout for cache in caches]

        def joined(name: str) -> Tensor | None:
            values = [getattr(layout, name) for layout in layouts]
            return None if values[0] is None else torch.cat(values)

        lengths = torch.cat([layout.lengths for layout in layouts])
        return Cache(
            layout=Layout(
                lengths_to_offsets(lengths),
                max_seqlen=None if lengths.device.type == "cpu" else max(layout.longest for layout in layouts),
                num_context=torch.cat([layout.context for layout in layouts]),
                segments=joined("segments"),
                is_memory=joined("is_memory"),
                timestamps=joined("timestamps"),
            ),
            places=torch.cat([cache.places for cache in caches]),
            lengths=torch.cat([cache.lengths for cache in caches]),
            timeless=torch.cat([cache.timeless for cache in caches]),
            layers=tuple(
                (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
                for layer in zip(*(cache.layers for cache in caches), strict=True)
            ),
            given={name: torch.cat([cache.given[name] for cache in caches]) for name in caches[0].given},
        )

    def split(self) -> list[Cache]:
        """Return the cache of each sample, in memory of its own: the reverse of ``joined``."""
        starts = self.layout.offsets.tolist()
        return [self._sample(b, slice(*starts[b : b + 2])) for b in range(self.num_samples)]

    def _sample(self, number: int, rows: slice) -> Cache:
        layout, one = self.layout, slice(number, number + 1)

        def own(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows].clone()

        return Cache(
            layout=Layout(
                lengths_to_offsets(layout.lengths[one]),
                max_seqlen=None if self.places.device.type == "cpu" else layout.longest,
                num_context=layout.context[one].clone(),
                segments=own(layout.segments),
                is_memory=own(layout.is_memory),
                timestamps=own(layout.timestamps),
            ),
            places=self.places[rows].clone(),
            lengths=self.lengths[one].clone(),
            timeless=self.timeless[one].clone(),
            layers=tuple((k[rows].clone(), v[rows].clone()) for k, v in self.layers),
            given={name: values[one].clone() for name, values in self.given.items()},
        )

    def compressed(self) -> Cache:
        """Return what is left when all memory of the segments so far is there: no more tokens of them will come."""
        return self._only(self._seen_later(complete=True))

    def _seen_later(self, *, complete: bool) -> Tensor:
        """Return which tokens something after all of them may attend to, [T] bool; ``complete``: see ``compressed``."""
        layout = self.layout
        if layout.segments is None or layout.is_memory is None:
            return torch.ones_like(self.places, dtype=torch.bool)
        owner, segments = sequence_ids(layout.offsets, self.places.numel()), layout.segments.long()
        reached = segments + layout.is_memory if complete else segments  # segments ascend
        last = torch.zeros_like(layout.lengths).scatter_reduce(0, owner, reached, "amax", include_self=False)
        return (self.places < layout.context[owner]) | layout.is_memory | (segments == last[owner])

    def _only(self, kept: Tensor) -> Cache:
        rows = kept.nonzero().squeeze(1)
        return replace(
            self,
            layout=select_rows(self.layout, rows),
            places=self.places[rows],
            layers=tuple((k[rows], v[rows]) for k, v in self.layers),
        )


class Past:
    """One pass of new tokens behind a cache. Layers call ``join`` once each, in the order in which they run.

    Args:
        cache: What stands in front; None for nothing.
        new: Layout of the new tokens.
        spaced: Leave room for what the cache has not kept, where distances between places matter.

    Attributes:
        keys: Layout of all tokens that new ones may attend to, and of themselves.
    """

    def __init__(self, cache: Cache | None, new: Layout, *, spaced: bool) -> None:
        self.cache, self.new = cache, new
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.before = torch.zeros_like(new.lengths) if cache is None else cache.lengths
        total = _num_tokens(new)
        owner, place = sequences_and_positions(new.offsets, total)
        self.places = self.before[owner] + place
        if cache is None:
            self.keys, self.old_rows, self.new_rows = new, None, None
            return
        kept = cache.layout.lengths
        sizes = (self.before if spaced else kept) + new.lengths
        offsets, old = lengths_to_offsets(sizes), sequence_ids(cache.layout.offsets, _num_tokens(cache.layout))
        in_old = cache.places if spaced else positions_in_sequence(cache.layout.offsets, old.numel())
        self.old_rows = offsets[old] + in_old
        self.new_rows = offsets[owner] + ((self.before if spaced else kept)[owner] + place)
        self.size = int(offsets[-1]) if spaced else old.numel() + total
        self.keys = self._joined(offsets, sizes, old, owner)

    def _joined(self, offsets: Tensor, sizes: Tensor, old: Tensor, owner: Tensor) -> Layout:
        assert self.cache is not None and self.old_rows is not None and self.new_rows is not None
        cache, new = self.cache.layout, self.new
        on_host = offsets.device.type == "cpu"

        def join(before: Tensor | None, after: Tensor | None, default: int) -> Tensor | None:
            if before is None or after is None:
                assert before is after, "the cache and the new tokens are of one model"
                return None
            return self._scatter(before.new_full((self.size,), default), before, after)

        times = None
        if cache.timestamps is not None and new.timestamps is not None:
            latest = torch.zeros_like(sizes)
            latest = latest.scatter_reduce(0, old, cache.timestamps, "amax", include_self=False)
            first = latest
            if owner.numel():
                ahead = new.timestamps[new.offsets[:-1].clamp(max=owner.numel() - 1)]
                first = torch.where(new.lengths > 0, ahead, latest)
            past = torch.where(self.cache.timeless[old], first[old], cache.timestamps)
            times = self._scatter(torch.repeat_interleave(latest, sizes, output_size=self.size), past, new.timestamps)
        has_holes = self.size > self.old_rows.numel() + self.new_rows.numel()
        return Layout(
            offsets,
            max_seqlen=None if on_host else cache.longest + new.longest + int(self.before.max()) * has_holes,
            num_context=cache.context + new.context,
            num_candidates=new.num_candidates,
            segments=join(cache.segments, new.segments, HIDDEN_SEGMENT),
            is_memory=join(cache.is_memory, new.is_memory, 0),
            timestamps=times,
        )

    def _scatter(self, into: Tensor, old: Tensor, new: Tensor) -> Tensor:
        assert self.old_rows is not None and self.new_rows is not None
        return into.index_copy_(0, self.old_rows, old.to(into.dtype)).index_copy_(0, self.new_rows, new.to(into.dtype))

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of ``keys`` from those of the new tokens in the present layer."""
        if self.cache is not None:
            pairs = zip(self.cache.layers[len(self.layers)], (k, v), strict=True)
            k, v = (self._scatter(now.new_zeros(self.size, *now.shape[1:]), old, now) for old, now in pairs)
        self.layers.append((k, v))
        return k, v

    def kept(self, final: Tensor) -> Cache:
        """Return the cache for what comes after the new tokens that are ``final`` [t] bool.

        Final tokens of a sample come before all others of it.
        """
        if self.cache is not None and not bool(final.any()):
            return self.cache
        owner = sequence_ids(self.new.offsets, final.numel())
        lengths = self.before.index_add(0, owner, final.long())
        if self.cache is None:
            kept, places, timeless = final, self.places, torch.ones_like(lengths, dtype=torch.bool)
        else:
            assert self.old_rows is not None
            old, timeless = torch.ones_like(self.old_rows, dtype=torch.bool), self.cache.timeless
            kept = self._scatter(final.new_zeros(self.size), old, final)
            places = self._scatter(self.places.new_zeros(self.size), self.cache.places, self.places)
        event = final & (positions_in_sequence(self.new.offsets, final.numel()) >= self.new.context[owner])
        if self.new.is_memory is not None:
            event = event & ~self.new.is_memory
        everything = Cache(
            layout=self.keys,
            places=places,
            lengths=lengths,
            timeless=timeless & (torch.zeros_like(lengths).index_add(0, owner, event.long()) == 0),
            layers=tuple(self.layers),
        )
        everything = everything._only(kept)
        return everything._only(everything._seen_later(complete=False))


def run_behind(
    stack: Callable[[Tokens], Tensor],
    cache: Cache | None,
    tokens: Tokens,
    mask: Mask,
    *,
    by_place: bool = False,
    asks_next: bool = False,
) -> tuple[Tensor, Cache]:
    """Run ``stack`` over new tokens that attend to a cache and to themselves.

    Args:
        stack: Layers that call ``tokens.past``.
        cache: Of what stands before; None for nothing.
        tokens: What follows the ``cache.lengths`` tokens of each sample, all of them local, at their own positions.
        mask: Of the stack.
        by_place: Whether the stack knows distances between places.
        asks_next: Whether a token depends on the time of the one after it: the last is then not kept.

    Returns:
        Hidden states [t, D], and the cache with these tokens; candidates are never in it.

    Raises:
        ValueError: if tokens in the cache would have to attend to the new ones.
    """
    assert tokens.local is None, "the values of all new tokens"
    layout = tokens.layout
    if not mask.causal:
        raise ValueError("attention from both sides leaves nothing that can be kept; run all tokens at once")
    if mask.context == "full" and cache is not None:
        _check_full_context(cache, layout)
    past = Past(cache, layout, spaced=by_place and cache is not None and _has_holes(cache))
    hidden = stack(replace(tokens, past=past))
    total = _num_tokens(layout)
    owner, place = sequences_and_positions(layout.offsets, total)
    final = place < layout.history[owner]
    if asks_next:
        last = place == layout.history[owner] - 1
        final = final & ~(last if layout.is_memory is None else last & ~layout.is_memory)
    return hidden, past.kept(final)


def alone(tokens: Tokens, positions: Tensor) -> Tokens:
    """Return a stream of the local rows of ``tokens`` and nothing else, at ``positions`` [t]."""
    if tokens.local is None:
        return replace(tokens, positions=positions)
    rows = tokens.local
    own = select_rows(tokens.layout, rows)
    return Tokens(
        layout=own,
        event_rows=rows[:0],
        tokens_per_event=tokens.tokens_per_event,
        positions=positions,
        values=tokens.values,
    )


def select_rows(layout: Layout, rows: Tensor) -> Layout:
    """Return the layout of some of its tokens, ``rows`` [n] int64 ascending."""
    owner = sequence_ids(layout.offsets, _num_tokens(layout))[rows]
    place = rows - layout.offsets[owner]

    def count(which: Tensor) -> Tensor:
        return torch.zeros_like(layout.lengths).index_add(0, owner, which.long())

    return Layout(
        lengths_to_offsets(count(torch.ones_like(rows))),
        max_seqlen=None if rows.device.type == "cpu" else layout.longest,
        num_context=count(place < layout.context[owner]),
        num_candidates=count(place >= layout.history[owner]),
        segments=None if layout.segments is None else layout.segments[rows],
        is_memory=None if layout.is_memory is None else layout.is_memory[rows],
        timestamps=None if layout.timestamps is None else layout.timestamps[rows],
    )


def _num_tokens(layout: Layout) -> int:
    assert layout.timestamps is not None
    return layout.timestamps.shape[0]


def _has_holes(cache: Cache) -> bool:
    return cache.places.numel() < int(cache.lengths.sum())


def _check_full_context(cache: Cache, new: Layout) -> None:
    """Raise ``ValueError`` if context in ``cache`` attends to a token of ``new``."""
    total = _num_tokens(new)
    owner = sequence_ids(new.offsets, total)
    seen = positions_in_sequence(new.offsets, total) < new.history[owner]
    if new.segments is not None:
        hidden = new.segments != 0
        seen = seen & ~(hidden if new.is_memory is None else hidden & ~new.is_memory)
    if bool((seen & (cache.layout.context[owner] > 0)).any()):
        raise ValueError(
            "NetworkArgs.context_attention = 'full': context tokens attend to events that come later, which a cache "
            "cannot take in; run the whole history at once, candidates after it"
        )
