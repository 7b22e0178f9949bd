"""Memory tokens: what of a long history is compressed, into how many tokens, and which events stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hstu.config.base import UNSET, Args

if TYPE_CHECKING:
    from hstu.config.args import DatasetArgs, NetworkArgs

BACKBONES = ("hstu", "sasrec", "llama")


@dataclass(frozen=True, kw_only=True)
class MemoryArgs(Args):
    """Learned tokens that stand between parts of the history; later parts attend to them and not to what is before.

    A full history has ``pretrain_item_num`` events to compress and ``recent_item_num`` after them, which together are
    ``DatasetArgs.max_history_seqlen``. A shorter one lacks its oldest: its recent events are as many, and all memory
    tokens stay. With ``DatasetArgs.sessions`` the recent events are those of the last session, however few.
    """

    #: Memory tokens of a sample; 0: no memory.
    num_memory_tokens: int = 0
    #: [[offset, k], ...]: k tokens after so many events of a full history. None: all after ``pretrain_item_num``.
    insert_method: tuple[tuple[int, ...], ...] = UNSET
    #: Events that a stored memory stands for; one block of tokens follows them.
    pretrain_item_num: int = UNSET
    #: None: DatasetArgs.max_history_seqlen less ``pretrain_item_num``.
    recent_item_num: int = UNSET
    #: Put the training loss only on rows after the last block.
    loss_on_recent_only: bool = False

    limits: ClassVar = {
        "num_memory_tokens": (0, 2**16),
        **dict.fromkeys(("pretrain_item_num", "recent_item_num"), (0, 2**20)),
        "insert_method": (1, 2**20),
    }

    def resolve(self) -> None:
        if self.num_memory_tokens and self.insert_method and self.pretrain_item_num is None:
            object.__setattr__(self, "pretrain_item_num", self.insert_method[-1][0])
        if self.num_memory_tokens and self.insert_method is None and self.pretrain_item_num:
            object.__setattr__(self, "insert_method", ((self.pretrain_item_num, self.num_memory_tokens),))

    def validate(self) -> None:
        if not self.num_memory_tokens:
            for name in ("insert_method", "pretrain_item_num", "recent_item_num", "loss_on_recent_only"):
                if getattr(self, name) != self.__dataclass_fields__[name].default:
                    raise self.error(name, "needs MemoryArgs.num_memory_tokens above 0")
            return
        if not self.pretrain_item_num:
            raise self.error("pretrain_item_num", "must be above 0 where there are memory tokens")
        assert self.insert_method
        if any(len(block) != 2 for block in self.insert_method):
            raise self.error("insert_method", "must be a list of pairs [offset, number of tokens]")
        offsets, sizes = zip(*self.insert_method, strict=True)
        if list(offsets) != sorted(set(offsets)):
            raise self.error("insert_method", "offsets must ascend")
        if sum(sizes) != self.num_memory_tokens:
            raise self.error("insert_method", f"has {sum(sizes)} tokens, MemoryArgs.num_memory_tokens is "
                             f"{self.num_memory_tokens}; make them equal")  # fmt: skip
        if self.pretrain_item_num not in offsets:
            raise self.error("pretrain_item_num", f"no block of MemoryArgs.insert_method = {self.insert_method} stands "
                             "there, so that the events before it would be lost; use one of its offsets")  # fmt: skip

    def _check_sessions(self, dataset: DatasetArgs, recent: int) -> None:
        if self.insert_method[-1][0] != self.pretrain_item_num:
            raise self.error("insert_method", f"has a block after MemoryArgs.pretrain_item_num = "
                             f"{self.pretrain_item_num}, where with DatasetArgs.sessions the last session begins; "
                             "leave it out")  # fmt: skip
        if recent == 0:
            raise self.error("pretrain_item_num", "leaves no room for events of the last session; make it less than "
                             "DatasetArgs.max_history_seqlen")  # fmt: skip
        if (dataset.train_stride or 0) > recent:
            raise dataset.error("train_stride", f"must be at most {recent} (DatasetArgs.max_history_seqlen less "
                                "MemoryArgs.pretrain_item_num), or some events are never a target")  # fmt: skip

    @property
    def recent_targets(self) -> int | None:
        """Events after the last block that carry a loss in a full history, where only those do; else None."""
        if not self.loss_on_recent_only:
            return None
        return self.pretrain_item_num + self.recent_item_num - self.insert_method[-1][0]

    def fitted(self, dataset: DatasetArgs, network: NetworkArgs) -> MemoryArgs:
        """Return these args with ``recent_item_num`` set.

        Raises:
            ConfigError: if they do not fit the histories or the backbone.
        """
        if not self.num_memory_tokens:
            return self
        state = "keeps one state and attends to nothing"
        reasons = {"gru": state, "lstm": state, "bert": "attends to what comes later"}
        if network.backbone not in BACKBONES:
            reason = reasons.get(network.backbone, "knows no segments")
            raise self.error("num_memory_tokens", f"NetworkArgs.backbone = {network.backbone!r} {reason}; use "
                             f"{', '.join(BACKBONES)}")  # fmt: skip
        longest, recent = dataset.max_history_seqlen, self.recent_item_num
        if self.insert_method[-1][0] > longest:
            raise self.error("insert_method", f"offset {self.insert_method[-1][0]} lies beyond the history, "
                             f"DatasetArgs.max_history_seqlen = {longest}")  # fmt: skip
        recent = longest - self.pretrain_item_num if recent is None else recent
        if recent < 0 or self.pretrain_item_num + recent != longest:
            given = "" if self.recent_item_num is None else f" and MemoryArgs.recent_item_num = {self.recent_item_num}"
            raise self.error("pretrain_item_num", f"{given.lstrip() + ' ' if given else ''}must make "
                             f"DatasetArgs.max_history_seqlen = {longest}")  # fmt: skip
        if dataset.sessions is not None:
            self._check_sessions(dataset, recent)
        fitted = MemoryArgs(**{**vars(self), "recent_item_num": recent})
        if fitted.recent_targets == 0:
            raise self.error("loss_on_recent_only", "no event stands after the last block; leave it False")
        if fitted.recent_targets and dataset.history_end is not None:
            raise self.error("loss_on_recent_only", "needs histories to their end; leave out DatasetArgs.history_end")
        if fitted.recent_targets and (dataset.train_stride or 0) > fitted.recent_targets:
            raise dataset.error("train_stride", f"must be at most {fitted.recent_targets} (the events after the last "
                                "block of MemoryArgs.insert_method), or some are never a target")  # fmt: skip
        return fitted
