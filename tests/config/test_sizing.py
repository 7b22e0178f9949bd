"""What the size of a data set decides where a retrieval config leaves it open."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hstu.config import LoadedConfig, load_config
from hstu.config.sizing import SHAPE, DataSize, suggest

SMALL = DataSize(users=19_412, items=11_924, events=167_597, has_times=False)
DENSE = DataSize(users=943, items=1_682, events=100_000)
LARGE = DataSize(users=2_000_000, items=1_000_000, events=100_000_000)


def sized(size: DataSize, *lines: str, start: dict[str, object] | None = None) -> LoadedConfig:
    return load_config("retrieval", ["custom_retrieval.gin"], lines).sized_by(size, start)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (SMALL, {"train_batch_size": 256, "max_epochs": 26, "max_history_seqlen": 50, "train_stride": None,
                 "hidden_size": 64, "hidden_dropout": 0.5, "relative_time_bias": False, "eval_interval": 197,
                 "loss": "sampled_softmax", "num_negatives": 512}),
        (DENSE, {"train_batch_size": 32, "max_epochs": 34, "max_history_seqlen": 200, "train_stride": 100,
                 "hidden_size": 64, "hidden_dropout": 0.3, "relative_time_bias": True, "loss": "full_softmax"}),
        (LARGE, {"train_batch_size": 32, "max_epochs": 3, "max_history_seqlen": 200, "hidden_size": 256,
                 "num_attention_heads": 8, "kv_channels": 32, "hidden_dropout": 0.3, "num_negatives": 512}),
    ],
    ids=["short", "dense", "large"],
)  # fmt: skip
def test_what_a_size_decides(size: DataSize, expected: dict[str, object]) -> None:
    config = sized(size).config
    owners = (config.trainer, config.dataset, config.network, config.retrieval)
    found = {name: getattr(owner, name) for owner in owners for name in expected if hasattr(owner, name)}
    assert found == expected


@pytest.mark.parametrize("users", [0, 1, 7, 10**9])
@pytest.mark.parametrize("items", [1, 10**7])
@pytest.mark.parametrize("mean", [0, 1, 3, 24, 26, 10**5])
def test_a_log_of_any_size_gives_a_config_that_holds(users: int, items: int, mean: int) -> None:
    config = sized(DataSize(users=users, items=items, events=users * mean)).config
    assert config.trainer.max_epochs is not None and config.trainer.max_epochs >= 3
    assert config.trainer.eval_interval >= config.trainer.log_interval


def test_what_is_set_wins_and_what_follows_from_it_follows() -> None:
    lines = ["NetworkArgs.hidden_size=48", "TrainerArgs.train_batch_size=7", "TrainerArgs.max_train_iters=100",
             "NetworkArgs.backbone='sasrec'", "RetrievalArgs.loss='bce'"]  # fmt: skip
    loaded = sized(SMALL, *lines)
    config = loaded.config
    assert (config.network.hidden_size, config.trainer.train_batch_size, config.trainer.max_train_iters) == (48, 7, 100)
    assert config.network.num_attention_heads * config.network.kv_channels == 48
    assert config.trainer.eval_interval == 10, "a tenth of the steps that are taken"
    assert config.trainer.max_epochs is None
    assert config.retrieval is not None and config.retrieval.loss == "bce"
    assert config.retrieval.num_negatives != 512, "a number that was chosen for another loss"


def test_where_hidden_items_are_the_labels_epochs_give_as_many() -> None:
    for size, epochs, dropout in ((SMALL, 65, 0.3), (DENSE, 85, 0.2)):
        config = sized(size, "NetworkArgs.backbone='bert'").config
        assert config.trainer.max_epochs == epochs
        assert (config.network.hidden_dropout, config.network.norm_placement) == (dropout, "pre")
        assert config.retrieval is not None and config.retrieval.mask_probability == 0.4
    config = sized(SMALL, "NetworkArgs.backbone='bert'", "RetrievalArgs.mask_probability=0.2").config
    assert config.trainer.max_epochs == 130


def test_ranks_share_a_step() -> None:
    one, four = (sized(replace(SMALL, ranks=ranks)).config.trainer for ranks in (1, 4))
    assert one.train_batch_size == 4 * four.train_batch_size == 256
    assert one.eval_interval == four.eval_interval
    assert sized(replace(SMALL, ranks=1000)).config.trainer.train_batch_size == 1


def test_the_choice_is_printed_and_loads_as_it_is() -> None:
    loaded = sized(SMALL)
    assert loaded.notes[-1].startswith("by the size of the data (19,412 users, 11,924 items, 167,597 events): ")
    for key, value in suggest(SMALL, {}).items():
        assert f"{key} = {value!r}" in loaded.notes[-1]
        assert f"{key} = {value!r}\n" in loaded.given
    assert loaded.config.retrieval is not None and not loaded.config.retrieval.sized_by_data


def test_a_run_that_starts_from_another_one_keeps_the_shape_of_its_weights() -> None:
    start = dict(zip(SHAPE, (50, 96, 2, 48), strict=True)) | {"TrainerArgs.max_epochs": 99}
    config = sized(LARGE, start=start).config
    assert [config.dataset.max_history_seqlen, config.network.hidden_size] == [50, 96]
    assert [config.network.num_attention_heads, config.network.kv_channels] == [2, 48]
    assert config.trainer.max_epochs == 3
    assert sized(LARGE, "NetworkArgs.hidden_size=32", "NetworkArgs.kv_channels=16",
                 "NetworkArgs.num_attention_heads=2", start=start).config.network.hidden_size == 32  # fmt: skip
