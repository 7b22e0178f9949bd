"""KuaiRand: every exposure of a video is an event, its action the mask of the eight signals that followed.

The events are those of the standard logs, the sequence that the user saw under the recommender. The log of random
interventions is another experiment (it shows what users do with videos they were not recommended) and stays out.

Published for these logs are 322,278,385, 11,713,045 and 1,436,609 events, which are checked, as are the 27,285,
1,000 and 27,285 lines of the file of users. Numbers of users and items are published for both logs together; where a
count of the standard logs is known to differ, it is accepted too: 27,077 users of Pure, and 32,038,693 items of 27K
(32 of the 7,583 videos of the random log are in no standard log, as the 7,551 of Pure show). The lengths of sequences
published of 27K (100 to 228,000, mean 11,796) are compared, within 1%, and another one is warned of: by the published
number of events the mean is 11,811.6. Those of 1K are not: a mean of 5,038 cannot be that of 11,713,045 events.

A user with events in one log file only is kept, and one that the file of users does not know gets UNKNOWN, and no
numbers. The eight signals have names: "action:long_view" is a task of ranking.
"""

from __future__ import annotations

import polars as pl

from hstu.data.interactions import USER
from hstu.data.log_encoder import EncodingOptions
from hstu.preprocessing.layout import Field, Layout, milliseconds
from hstu.preprocessing.published import Known, Published, TableFile
from hstu.preprocessing.raw_files import Archive

EVENTS = {
    "is_click": 1,
    "is_like": 2,
    "is_follow": 4,
    "is_comment": 8,
    "is_forward": 16,
    "is_hate": 32,
    "long_view": 64,
    "is_profile_enter": 128,
}
LOG_FIELDS = [
    "user_id",
    "video_id",
    "date",
    "hourmin",
    "time_ms",
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "play_time_ms",
    "duration_ms",
    "profile_stay_time",
    "comment_stay_time",
    "is_profile_enter",
    "is_rand",
    "tab",
]  # noqa: SIM905
USER_FIELDS = [
    "user_id",
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num",
    "follow_user_num_range",
    "fans_user_num",
    "fans_user_num_range",
    "friend_user_num",
    "friend_user_num_range",
    "register_days",
    "register_days_range",
] + [  # noqa: SIM905
    f"onehot_feat{number}" for number in range(18)
]
CONTEXTS = (
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)
FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
ENCRYPTED = tuple(f"onehot_feat{number}" for number in range(18))
USER_FEATURES = ",".join([
    *(f"{name}:categorical" for name in (*CONTEXTS, *FLAGS, *ENCRYPTED)), *(f"{name}:numeric" for name in NUMBERS)
])  # fmt: skip
UNKNOWN = "UNKNOWN"  # the published value of an unknown user_active_degree


def _log_field(name: str) -> Field:
    if name in ("user_id", "video_id"):
        return Field(name, pl.Int64)
    if name == "time_ms":
        return milliseconds(name)
    return Field(name, pl.UInt8, (0, 1), "0 or 1") if name in EVENTS else Field(name)


def _user_field(name: str) -> Field:
    if name == "user_id":
        return Field(name, pl.Int64)
    if name in NUMBERS:
        return Field(name, pl.Float64, optional=True)
    return Field(name, pl.String if name in (*CONTEXTS, *FLAGS, *ENCRYPTED) else None, optional=True)


def _published(
    size: str,
    md5: str,
    *,
    parts: tuple[str, ...] = ("",),
    users: int,
    log_counts: Known,
    lengths: dict[str, int] | None = None,
) -> Published:
    suffix = size.lower()
    return Published(
        archive=Archive(
            file_name=f"KuaiRand-{size}.tar.gz",
            url=f"https://zenodo.org/records/10439422/files/KuaiRand-{size}.tar.gz",
            checksum=f"md5:{md5}",
            root=f"KuaiRand-{size}/data",
        ),
        logs=tuple(
            f"log_standard_{period}_{suffix}{part}.csv" for period in ("4_08_to_4_21", "4_22_to_5_08") for part in parts
        ),
        layout=Layout(fields=tuple(map(_log_field, LOG_FIELDS)), header=True),
        columns=(
            pl.col("user_id").alias("user"),
            pl.col("video_id").alias("item"),
            pl.sum_horizontal(pl.col(name) * pl.lit(bit, pl.UInt8) for name, bit in EVENTS.items()).alias("action"),
            pl.col("time_ms").alias("time"),
        ),
        users=TableFile(
            name=f"user_features_{suffix}.csv",
            # Ranges such as "(0,10]" hold the separator.
            layout=Layout(fields=tuple(map(_user_field, USER_FIELDS)), header=True, quoted=True),
            columns=(
                pl.col("user_id").alias(USER),
                pl.col(*CONTEXTS, *FLAGS, *ENCRYPTED).fill_null(UNKNOWN),
                pl.col(NUMBERS),
            ),
            features=USER_FEATURES,
            rows=users,
        ),
        action_name="action",
        action_bits=len(EVENTS),
        options=EncodingOptions(ticks_per_second=1000, bit_names=tuple(EVENTS), absent_context=UNKNOWN, judge=False),
        log_counts=log_counts,
        lengths=lengths or {},
    )


DATASETS = {
    "kuairand-pure": _published(
        "Pure",
        "0820331067a3784d9691136f772b35a7",
        users=27_285,
        log_counts={"users": (27_285, 27_077), "items": 7_551, "events": 1_436_609},
    ),
    "kuairand-1k": _published(
        "1K",
        "6b0b9c8222d67fcd4c676218edca3f1f",
        users=1_000,
        log_counts={"users": 1_000, "items": 4_369_953, "events": 11_713_045},
    ),
    "kuairand-27k": _published(
        "27K",
        "3e3c799a24e2d23a4d2c757fbf9adf59",
        parts=("_part1", "_part2"),
        users=27_285,
        log_counts={"users": 27_285, "items": (32_038_725, 32_038_693), "events": 322_278_385},
        lengths={"seqlen_min": 100, "seqlen_max": 228_000, "seqlen_mean": 11_796},
    ),
}
