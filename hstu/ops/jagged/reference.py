"""Jagged helpers in plain torch; the definition of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu.ops.checks import check_offsets, values_readable
from hstu.ops.jagged.rows import located, merge_rows, part_rows


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """Turn lengths ``[B]`` into offsets ``[B + 1]`` int64 that start at 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def sequence_ids(offsets: Tensor, total: int) -> Tensor:
    """Return ``[total]`` int64: the sequence each token belongs to."""
    if (found := located(offsets, total)) is not None:
        return found[0]
    batch = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(batch, offsets.diff(), output_size=total)


def positions_in_sequence(offsets: Tensor, total: int) -> Tensor:
    """Return ``[total]`` int64: 0, 1, 2 ... within each sequence."""
    return sequences_and_positions(offsets, total)[1]


def sequences_and_positions(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return what ``sequence_ids`` and ``positions_in_sequence`` do, in one kernel on a GPU."""
    if (found := located(offsets, total)) is not None:
        return found
    sequence = sequence_ids(offsets, total)
    return sequence, torch.arange(total, device=offsets.device) - offsets[sequence]


def concat_jagged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate jagged tensors sample by sample; differentiable.

    Args:
        parts: pairs ``(values [T_k, ...], offsets [B + 1])`` with the same B, trailing shape and dtype.

    Returns:
        ``(values [sum T_k, ...], offsets [B + 1])``; sample b holds its rows of part 0, then of part 1, ...

    Raises:
        ValueError: no parts, different numbers of samples, or offsets that do not fit the values.
    """
    if not parts:
        raise ValueError("concat_jagged needs at least one part")
    for index, (values, offsets) in enumerate(parts):
        check_offsets(f"offsets of part {index}", offsets, values.shape[0])
        if offsets.numel() != parts[0][1].numel():
            raise ValueError(f"part {index} has {offsets.numel() - 1} samples, part 0 has {parts[0][1].numel() - 1}")
    rows = [values for values, _ in parts]
    places, out_offsets = _places([offsets for _, offsets in parts], [own.shape[0] for own in rows])
    return merge_rows(rows, places), out_offsets


def split_jagged(
    values: Tensor,
    offsets: Tensor,
    part_lengths: Sequence[Tensor],
    totals: Sequence[int] | None = None,
) -> list[Tensor]:
    """Split each sample into consecutive parts: the inverse of :func:`concat_jagged`; differentiable.

    Args:
        values: ``[T, ...]``.
        offsets: ``[B + 1]``.
        part_lengths: one ``[B]`` integer tensor a part; they sum to the length of each sample.
        totals: the sum of each part's lengths, when known on the host: saves a device sync.

    Returns:
        ``values_k [T_k, ...]`` for each part.

    Raises:
        ValueError: lengths that do not add up to the samples' lengths.
    """
    check_offsets("offsets", offsets, values.shape[0])
    if not part_lengths:
        raise ValueError("split_jagged needs at least one part")
    if values_readable(offsets):
        wrong = torch.stack(tuple(part_lengths)).sum(0) != offsets.diff()
        if bool(wrong.any()):
            raise ValueError(
                f"part_lengths do not add up to the length of sample {int(wrong.nonzero()[0])}: "
                "every token must belong to one part"
            )
    part_offsets = [lengths_to_offsets(lengths) for lengths in part_lengths]
    sizes = list(totals) if totals is not None else torch.stack([o[-1] for o in part_offsets]).tolist()
    places, _ = _places(part_offsets, sizes)
    return part_rows(values, places)


def interleave_jagged(
    items: Tensor, item_offsets: Tensor, actions: Tensor, action_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge items and actions of each sample as ``i1 a1 i2 a2 ..``; differentiable.

    Args:
        items: ``[T_i, D]``; ``item_offsets [B + 1]``.
        item_offsets: see ``items``.
        actions: ``[T_a, D]``, at most as many a sample as items.
        action_offsets: ``[B + 1]``.

    Returns:
        ``(values [T_i + T_a, D], offsets [B + 1])``; items beyond the number of actions (candidates) follow
        at the end, without an action.

    Raises:
        ValueError: a sample with more actions than items, or offsets that do not fit.
    """
    check_offsets("item_offsets", item_offsets, items.shape[0])
    check_offsets("action_offsets", action_offsets, actions.shape[0])
    if item_offsets.numel() != action_offsets.numel():
        raise ValueError(f"items have {item_offsets.numel() - 1} samples, actions have {action_offsets.numel() - 1}")
    num_actions = action_offsets.diff()
    if values_readable(num_actions) and bool((num_actions > item_offsets.diff()).any()):
        sample = int((num_actions > item_offsets.diff()).nonzero()[0])
        raise ValueError(f"sample {sample} has more actions than items")
    offsets = item_offsets + action_offsets
    of_item, of_action = (
        sequence_ids(item_offsets, items.shape[0]),
        sequence_ids(action_offsets, actions.shape[0]),
    )
    position = torch.arange(items.shape[0], device=items.device) - item_offsets[of_item]
    item_places = offsets[of_item] + position + torch.minimum(position, num_actions[of_item])
    position = torch.arange(actions.shape[0], device=actions.device) - action_offsets[of_action]
    action_places = offsets[of_action] + 2 * position + 1
    return merge_rows([items, actions], [item_places, action_places]), offsets


def _places(offsets: Sequence[Tensor], sizes: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Row of the concatenation for each row of each part, and the concatenation's offsets."""
    start = out_offsets = torch.stack(tuple(offsets)).sum(0)
    places = []
    for part, size in zip(offsets, sizes, strict=True):
        sample = sequence_ids(part, size)
        places.append((start[:-1] - part[:-1])[sample] + torch.arange(size, device=part.device))
        start = start + torch.cat([part.diff(), part.new_zeros(1)])
    return places, out_offsets
