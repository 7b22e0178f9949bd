"""When the rows of a dynamic table were last trained, and which ids lost theirs: what an incremental export writes."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.ops.row_sets import BLOCKED, FREE, WAYS
from hstu.parallel.row_map import RowMap, by_part, part_of, starts


class RowHistory:
    """When rows were last trained, and which ids lost theirs when: what was written since a step.

    Args:
        rows: The map.
    """

    def __init__(self, rows: RowMap) -> None:
        self.parts, device = rows.parts, rows.ids.device
        self.steps = torch.zeros_like(rows.scores)
        #: The last evictions of each part, a ring. One lookup evicts at most as many ids as the part has rows.
        self.length = max(rows.sets * WAYS, 1024)
        entries = len(self.parts) * self.length + 1
        self.evicted = torch.full((entries,), FREE, device=device)
        self.evicted_steps = torch.zeros(entries, dtype=torch.int32, device=device)
        self.evictions = torch.zeros(len(self.parts) + 1, dtype=torch.int64, device=device)

    def note(self, step: int, places: Tensor, evicted: Tensor) -> None:
        """Take down that ``places`` [n] were trained in ``step``, and that ``evicted`` [m] lost their rows."""
        # Numbers that are assigned are first copied to the device; numbers to fill with are not.
        self.steps.index_fill_(0, places, step)
        part = (part_of(evicted) - self.parts.start) // self.parts.step
        part, order = torch.where(evicted < BLOCKED, part, len(self.parts)).sort(stable=True)
        index = torch.arange(len(part), device=part.device)
        number = self.evictions[part] + index - torch.where(starts(part), index, 0).cummax(0).values
        where = (part * self.length + number % self.length).clamp(max=len(self.evicted) - 1)
        self.evicted[where] = evicted[order]
        self.evicted_steps.index_fill_(0, where, step)
        self.evictions.index_add_(0, part, torch.ones_like(part))

    def evicted_since(self, number: int, step: int) -> Tensor:
        """Return the ids that lost their rows in the ``number``-th part after ``step``, in that order.

        Raises:
            ValueError: if the ring does not go back so far.
        """
        total = int(self.evictions[number])
        order = torch.arange(max(0, total - self.length), total, device=self.steps.device)
        where = number * self.length + order % self.length
        steps = self.evicted_steps[where]
        if total > self.length and steps[0] > step:
            raise ValueError(f"more ids lost their rows after step {step} than are remembered; choose a step from "
                             f"{int(steps[0])} on, or export everything")  # fmt: skip
        return self.evicted[where[steps > step]]

    def state(self) -> dict[str, Tensor]:
        """Return all of it by names that no number of ranks changes; loading writes into it."""
        whole = {
            "steps": self.steps,
            "evicted": self.evicted,
            "evicted_steps": self.evicted_steps,
            "evictions": self.evictions,
        }
        return by_part(whole, self.parts)
