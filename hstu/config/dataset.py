"""Which data a run reads, how it is split, and how much of each sequence is seen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from hstu.config.base import Args

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def seconds_of(length: str) -> int | None:
    """Return the seconds of a length of time such as "30m", "12h", "1d" (of w, d, h, m, s); None if it is none."""
    given = re.fullmatch(r"([1-9]\d{0,8})([wdhms])", length)
    return None if given is None else int(given[1]) * _SECONDS[given[2]]


@dataclass(frozen=True, kw_only=True)
class DatasetArgs(Args):
    """Which preprocessed data set, and how much of each sequence.

    ``dataset_path`` defaults to ``tmp_data/<dataset_name>`` under the working directory or the
    repository root. A sequence keeps its most recent ``max_history_seqlen`` events.
    """

    #: Name of the data set, as it was given to the preprocessor.
    dataset_name: str
    #: The most events of a sample; of longer histories the most recent ones.
    max_history_seqlen: int
    #: Directory of the data set; None: see above.
    dataset_path: str | None = None
    #: Ranking: the last events of a training sequence that are scored as candidates; 0 puts the loss on
    #: every event of the history.
    max_num_candidates: int = 0
    #: Draw training samples in another order in each epoch.
    shuffle: bool = True
    #: Leave out the last batch of a training epoch if it is short, so that all have the same number of samples.
    drop_last: bool = False
    #: Context features of the schema to use as tokens; None uses all of them.
    contextual_feature_names: tuple[str, ...] | None = None
    #: "leave_one_out": train on all but the last two events of a user, validate on the last but one, test on
    #: the last. "temporal": train before a time, validate up to a later one, test on the rest. "by_user":
    #: train on the first 70% of the users, validate and test on the last two events of the others. "windows":
    #: train on one window of time, validate and test on the users of the next, half of them each.
    protocol: Literal["leave_one_out", "temporal", "by_user", "windows"] = "leave_one_out"
    #: "temporal": shares of all events that lie before the validation and before the test window.
    temporal_quantiles: tuple[float, ...] = (0.8, 0.9)
    #: "windows": into how many, of about as many events each.
    num_windows: int = 10
    #: "windows": the last to train on, from 0. "all": one run goes over them, from one to the next. A length, as "1d"
    #: (of w, d, h, m, s): likewise, over windows of so much time, which begin at multiples of it.
    window: int | str = 0
    #: Of a run over windows: the first to train on.
    first_window: int = 0
    #: Of a run over windows: the last to train on; None: the last that another one follows.
    last_window: int | None = None
    #: Of a run over windows: whether weights, tables and moments go on in the next one; else each begins anew.
    carry_over: bool = True
    #: "windows": how many are trained on, up to ``window``; 0: all up to it.
    train_windows: int = 1
    #: "temporal": where the validation and the test window begin, "windows": where all but the first begin, in
    #: seconds as in the data; wins over temporal_quantiles and num_windows.
    temporal_cuts: tuple[int, ...] | None = None
    #: None: a user's most recent events are one training sample. k: as many samples as it takes for every event
    #: to be a target once, each with a loss on its last k events alone and those before as history.
    train_stride: int | None = None
    #: What parts a user's events into sessions: a length of time, as "30m" (of w, d, h, m, s), where more than that
    #: lies between two events, or a column of events that says which session each is of. Every session is then a
    #: training sample of its own (long ones are several, as with train_stride): its events are the targets, and those
    #: of earlier sessions stand before them. MemoryArgs puts memory tokens where the last session of a sample begins.
    sessions: str | None = None
    #: The part of its history that a sample sees, as a Python slice [start:end]: start = -k is the last k
    #: events, end = -k hides the k newest (staleness). Of it the most recent max_history_seqlen are kept.
    history_start: int | None = None
    #: Where that slice ends; None: with the newest event.
    history_end: int | None = None
    #: Share of those events that a training sample keeps, drawn for each sample and epoch.
    history_sampling_ratio: float = 1.0
    #: Actions, as in the original data, whose events are inputs but never targets of the training loss, such
    #: as negative feedback; of bit masks, all that contain one of them.
    actions_without_loss: tuple[int | float | str, ...] = ()
    #: Who reads and collates batches: 0, the training thread; 1, a thread ahead of the step; more, as many processes.
    num_workers: int = 1

    limits: ClassVar = {
        **dict.fromkeys(("max_history_seqlen", "train_stride"), (1, 2**20)),
        "max_num_candidates": (0, 2**20),
        "num_windows": (2, 10**6),
        **dict.fromkeys(("window", "first_window", "last_window", "train_windows"), (0, 10**6)),
        **dict.fromkeys(("temporal_cuts", "actions_without_loss"), (-(2**62), 2**62)),
        **dict.fromkeys(("history_start", "history_end"), (-(2**31), 2**31)),
        **dict.fromkeys(("temporal_quantiles", "history_sampling_ratio"), (0, 1)),
        "num_workers": (0, 64),
    }

    def validate(self) -> None:
        if not 0 < self.history_sampling_ratio <= 1:
            raise self.error("history_sampling_ratio", "must be above 0 and at most 1")
        self._validate_cuts()
        self._validate_stride()
        start, end = self.history_start, self.history_end
        if start is not None and end is not None and (start < 0) == (end < 0) and start >= end:
            raise self.error("history_end", "must be above DatasetArgs.history_start, or no event is left")
        if end == 0:
            raise self.error("history_end", "leaves no event; use None for the whole history")
        if not self.dataset_name:
            raise self.error("dataset_name", "must name a data set")

    def _validate_cuts(self) -> None:
        quantiles, cuts = self.temporal_quantiles, self.temporal_cuts
        if len(quantiles) != 2 or not 0 < quantiles[0] < quantiles[1] < 1:
            raise self.error("temporal_quantiles", "must be two ascending numbers between 0 and 1, such as (0.8, 0.9)")
        if cuts is not None and self.protocol not in ("temporal", "windows"):
            raise self.error("temporal_cuts", "needs DatasetArgs.protocol = 'temporal' or 'windows'")
        if cuts is not None and (list(cuts) != sorted(set(cuts)) or not cuts):
            raise self.error("temporal_cuts", "must be ascending times in seconds")
        if cuts is not None and self.protocol == "temporal" and len(cuts) != 2:
            raise self.error("temporal_cuts", "must be two times for 'temporal'")
        for name in ("num_windows", "window", "first_window", "last_window", "carry_over", "train_windows"):
            if self.protocol != "windows" and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise self.error(name, "needs DatasetArgs.protocol = 'windows'")
        self._validate_window()

    def _validate_window(self) -> None:
        window = self.window
        if isinstance(window, int):
            self.require_range("train_windows", 0, window + 2)
            for name in ("first_window", "last_window", "carry_over"):
                if getattr(self, name) != self.__dataclass_fields__[name].default:
                    raise self.error(name, "needs DatasetArgs.window = 'all' or a length, as '1d'")
            return
        if window != "all" and self.window_seconds is None:
            raise self.error("window", "must be a number, 'all', or a length of time such as '1d', '12h', '2w'")
        if window != "all" and self.temporal_cuts is not None:
            raise self.error("temporal_cuts", "goes with DatasetArgs.window = 'all' or a number; a length has its own")
        if self.last_window is not None and self.last_window < self.first_window:
            raise self.error("last_window", f"must be at least DatasetArgs.first_window = {self.first_window}")

    @property
    def goes_over_windows(self) -> bool:
        """Whether one run trains on one window after another."""
        return isinstance(self.window, str)

    @property
    def window_seconds(self) -> int | None:
        """The length of a window, in seconds, if it has one."""
        return seconds_of(str(self.window))

    def _validate_stride(self) -> None:
        if self.sessions is not None and not self.sessions.strip():
            raise self.error("sessions", "must be a length of time, as '30m', or name a column of events")
        if self.train_stride is None:
            return
        longest = self.max_num_candidates or self.max_history_seqlen
        if self.train_stride > longest:
            raise self.error("train_stride", f"must be at most {longest} (max_num_candidates, or max_history_seqlen "
                             "without candidates), or some events are never a target")  # fmt: skip
        if self.history_start is not None or self.history_end is not None:
            raise self.error("train_stride", "needs the whole history: leave out history_start and history_end")
