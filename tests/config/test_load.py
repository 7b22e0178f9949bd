"""Gin files and bindings to a checked config: what loads, what wins, and one line for every mistake."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from hstu.config import ConfigError, load_config
from hstu.config.backbones import _USES
from hstu.config.load import _CLASSES, CONFIG_DIRECTORY, _construct

BASE = """\
TrainerArgs.train_batch_size = 8
TrainerArgs.eval_batch_size = 8
DatasetArgs.dataset_name = 'some'
DatasetArgs.max_history_seqlen = 20
NetworkArgs.num_layers = 1
NetworkArgs.hidden_size = 8
NetworkArgs.num_attention_heads = 2
NetworkArgs.kv_channels = 4
OptimizerArgs.optimizer_str = 'adam'
OptimizerArgs.learning_rate = 1e-3
"""
RANKING = BASE + "RankingArgs.prediction_head_arch = [8, 5]\n"
RETRIEVAL = BASE + "RetrievalArgs.num_negatives = 4\n"
TEXTS = {"ranking": RANKING, "retrieval": RETRIEVAL}

PUBLISHED_RANKING = """\
TrainerArgs.train_batch_size = 128
TrainerArgs.eval_batch_size = 128
TrainerArgs.eval_interval = 100
TrainerArgs.log_interval = 100
TrainerArgs.seed = 1234
TrainerArgs.max_train_iters = 1000
TrainerArgs.profile = True
TrainerArgs.pipeline_type = "native"

DatasetArgs.dataset_name = 'ml-20m'
DatasetArgs.max_sequence_length = 200
DatasetArgs.shuffle = True
DatasetArgs.max_num_candidates = 20

NetworkArgs.dtype_str = "bfloat16"
NetworkArgs.num_layers = 1
NetworkArgs.num_attention_heads = 4
NetworkArgs.hidden_size = 128
NetworkArgs.kv_channels = 128
NetworkArgs.target_group_size = 1

# a comment
RankingArgs.prediction_head_arch = [512, 10]
RankingArgs.prediction_head_bias = True
RankingArgs.num_tasks = 1
RankingArgs.eval_metrics = ("AUC",)

OptimizerArgs.optimizer_str = 'adam'
OptimizerArgs.learning_rate = 1e-3
OptimizerArgs.adam_beta1 = 0.9
OptimizerArgs.adam_beta2 = 0.98

TensorModelParallelArgs.tensor_model_parallel_size = 1
"""
PUBLISHED_RETRIEVAL = """\
TrainerArgs.train_batch_size = 128
TrainerArgs.eval_batch_size = 128
TrainerArgs.eval_interval = 100
TrainerArgs.log_interval = 100
TrainerArgs.ckpt_save_interval = -1
TrainerArgs.seed = 1234

DatasetArgs.dataset_name = 'ml-20m'
DatasetArgs.max_sequence_length = 200
DatasetArgs.shuffle = True

NetworkArgs.dtype_str = "bfloat16"
NetworkArgs.num_layers = 4
NetworkArgs.num_attention_heads = 4
NetworkArgs.hidden_size = 256
NetworkArgs.kv_channels = 64
NetworkArgs.hidden_dropout = 0
NetworkArgs.norm_epsilon = 1e-6
NetworkArgs.is_causal = True
NetworkArgs.dense_initializer_type = 'normal'
NetworkArgs.dense_initializer_normal_std = 0.02

OptimizerArgs.optimizer_str = 'adam'
OptimizerArgs.learning_rate = 1e-3
OptimizerArgs.adam_beta1 = 0.9
OptimizerArgs.adam_beta2 = 0.98

RetrievalArgs.num_negatives = 128
RetrievalArgs.eval_metrics = ("NDCG@10", "NDCG@20", "HR@10")

TensorModelParallelArgs.tensor_model_parallel_size = 1
"""


def write(folder: Path, text: str, name: str = "run.gin") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def message_of(folder: Path, text: str, bindings: tuple[str, ...] = (), task: str = "ranking") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(task, [write(folder, text)], bindings)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and "0x" not in message, message
    return message


LINE = RANKING.count("\n") + 1  # of a line added to the file
MISTAKES = [
    # (line, every part that the message must have)
    ("TrainerArgs.train_batch_sice = 3", ["TrainerArgs.train_batch_sice", "3", "train_batch_size?"]),
    ("TrainerArgs.zzz = 3", ["TrainerArgs.zzz", "fields: train_batch_size"]),
    ("TrainerArg.seed = 3", ["TrainerArg.seed", "3", "TrainerArgs?"]),
    ("Zzz.seed = 3", ["Zzz.seed", "classes: TrainerArgs"]),
    ("TrainerArgs.seed = '3'", ["TrainerArgs.seed = '3'", "an integer"]),
    ("TrainerArgs.seed = True", ["TrainerArgs.seed = True", "an integer"]),
    ("TrainerArgs.seed = 3.0", ["TrainerArgs.seed = 3.0", "an integer"]),
    ("TrainerArgs.seed = None", ["TrainerArgs.seed = None", "an integer"]),
    ("TrainerArgs.max_epochs = 'x'", ["TrainerArgs.max_epochs = 'x'", "an integer or None"]),
    ("TrainerArgs.profile = 1", ["TrainerArgs.profile = 1", "True or False"]),
    ("OptimizerArgs.learning_rate = '1e-3'", ["OptimizerArgs.learning_rate = '1e-3'", "a number"]),
    ("OptimizerArgs.learning_rate = 1e999", ["OptimizerArgs.learning_rate = inf", "finite"]),
    ("DatasetArgs.dataset_name = 3", ["DatasetArgs.dataset_name = 3", "a string"]),
    ("OptimizerArgs.optimizer_str = 'Adam'", ["= 'Adam'", "'adam', 'adamw', 'sgd'"]),
    ("NetworkArgs.gate = 'max'", ["NetworkArgs.gate = 'max'", "'mul', 'concat'", "None"]),
    ("RankingArgs.prediction_head_arch = 5", ["prediction_head_arch = 5", "a list, each item an integer"]),
    ("RankingArgs.prediction_head_arch = [8, '5']", ["prediction_head_arch = [8, '5']", "an integer"]),
    ("RankingArgs.eval_metrics = ('AUK',)", ["RankingArgs.eval_metrics = ('AUK',)", "AUC, GAUC, NE"]),
    ("EmbeddingArgs.table_sharding_types = {'a': 'x'}", ["table_sharding_types", "'row_wise'"]),
    ("TrainerArgs.train_batch_size = 0", ["TrainerArgs.train_batch_size = 0", "at least 1 and"]),
    ("TrainerArgs.ckpt_save_interval = -2", ["ckpt_save_interval = -2", "at least -1"]),
    ("TrainerArgs.seed = -1", ["TrainerArgs.seed = -1", "at least 0"]),
    ("NetworkArgs.hidden_dropout = 1", ["NetworkArgs.hidden_dropout = 1.0", "below 1"]),
    ("OptimizerArgs.min_learning_rate = 2", ["OptimizerArgs.min_learning_rate = 2.0", "learning_rate"]),
    ("RankingArgs.num_tasks = 3", ["RankingArgs.num_tasks = 3", "last width"]),
    ("TensorModelParallelArgs.tensor_model_parallel_size = 0", ["tensor_model_parallel_size = 0"]),
    ("TensorModelParallelArgs.sequence_parallel = True", ["sequence_parallel", "above 1"]),
    ("ContextParallelArgs.context_parallel_size = -1", ["context_parallel_size = -1"]),
    ("NetworkArgs.is_causal = False", ["NetworkArgs.is_causal = False", "leave it unset"]),
    ("NetworkArgs.context_attention = 'full'", ["context_attention = 'full'", "max_num_candidates above 0"]),
    ("NetworkArgs.num_time_buckets = 9", ["num_time_buckets = 9", "max_num_candidates above 0", "'gap'"]),
    ("NetworkArgs.token_layout = 'add'", ["NetworkArgs.token_layout = 'add'", "'interleave'"]),
    ("TrainerArgs.seed = = 3", ["Unable to parse value", "Class.field = value"]),
    ("TrainerArgs.seed 3", ["expected ':' or '='"]),
    ("DatasetArgs.dataset_name = my_log", ["'my_log'", "quotes"]),
    ("TrainerArgs.seed = @TrainerArgs()", ["@TrainerArgs mean nothing"]),
    ("TrainerArgs.seed = %MISSING", ["TrainerArgs.seed = %MISSING", "no line sets MISSING"]),
    ("train/TrainerArgs.seed = 3", ["train/TrainerArgs", "scopes mean nothing"]),
    ("seed = 3", ["seed = 3", "names no class", "write Class.seed"]),
    ("import no_such_module", ["import no_such_module", "No module named", "looked for in"]),
    ("include 'nowhere.gin'", ["include 'nowhere.gin'", "no such file; tried"]),
]


@pytest.mark.parametrize(("line", "parts"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_in_a_file_names_field_value_remedy_file_and_line(
    line: str, parts: list[str], tmp_path: Path
) -> None:
    message = message_of(tmp_path, RANKING + line + "\n")
    for part in [*parts, f"run.gin:{LINE}"]:
        assert part in message, (part, message)


@pytest.mark.parametrize(("line", "parts"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_in_a_binding_names_the_flag(line: str, parts: list[str], tmp_path: Path) -> None:
    message = message_of(tmp_path, RANKING, (line,))
    assert "--gin-bindings" in message and "run.gin" not in message, message


def has_number(hint: Any) -> bool:
    return hint in (int, float) or any(has_number(part) for part in typing.get_args(hint))


NUMBERS = [
    (cls, field, hints[field.name])
    for cls in _CLASSES.values()
    for hints in (typing.get_type_hints(cls),)
    for field in dataclasses.fields(cls)
    if has_number(hints[field.name])
]


@pytest.mark.parametrize("value", [10**30, -(10**30), 1e300, 10**400, 1 << 20000], ids=list("abcde"))
def test_no_number_is_too_large_for_its_error(value: float) -> None:
    """Each number of each class has a smallest and a largest value, and is refused in one line beyond them."""
    for cls, field, hint in NUMBERS:
        name = f"{cls.__name__}.{field.name}"
        task = "retrieval" if cls.__name__ == "RetrievalArgs" else "ranking"
        given = {"dict": {"item": value}, "tuple": (value,) * 2}
        kind = next((k for k in given if k in str(hint)), None)
        if isinstance(value, float) and not has_float(hint):
            continue
        with pytest.raises(ConfigError) as caught:
            _construct(cls.__name__, minimal(task, cls.__name__) | {field.name: given.get(kind, value)})
        assert str(caught.value).startswith(name) and len(str(caught.value)) < 500, name
        assert field.name in cls.limits, f"{name} needs limits"


def has_float(hint: Any) -> bool:
    return hint is float or any(has_float(part) for part in typing.get_args(hint))


def minimal(task: str, owner: str) -> dict[str, Any]:
    """Return the fields of one class in the texts above."""
    lines = [line.partition(" = ") for line in TEXTS[task].splitlines() if line.startswith(owner + ".")]
    return {key.partition(".")[2]: ast.literal_eval(value) for key, _, value in lines}


SENSELESS = {
    "RetrievalArgs.temperature": 1e-45,
    "OptimizerArgs.adam_eps": 1e-300,
    "OptimizerArgs.sparse_learning_rate": 1e30,
    "NetworkArgs.hidden_size": 10**9,
    "NetworkArgs.num_layers": 10**9,
    "RetrievalArgs.num_negatives": 10**12,
    "TrainerArgs.hang_timeout_seconds": 1e18,
    "RetrievalArgs.eval_metrics": ("HR@" + "9" * 30,),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_what_can_only_fail_later_is_refused(name: str, tmp_path: Path) -> None:
    message = message_of(tmp_path, RETRIEVAL, (f"{name} = {SENSELESS[name]!r}",), task="retrieval")
    assert message.startswith(f"{name} = ") and "must be" in message


def test_includes_stand_in_one_another_only_so_deep(tmp_path: Path) -> None:
    for number in range(1500):
        write(tmp_path, f"include '{number + 1}.gin'\n", f"{number}.gin")
    write(tmp_path, RANKING, "1500.gin")
    message = message_of(tmp_path, "include '0.gin'\n")
    assert message.startswith(f"{tmp_path}/48.gin:1: include '49.gin': stands in 50 files that include one another")
    load_config("ranking", [str(tmp_path / "1480.gin")])


@pytest.mark.parametrize("text", ["[" * 30000 + "]" * 30000, "-" * 9000 + "1", "9" * 5000], ids=list("abc"))
def test_text_that_no_parser_reads_is_one_short_line(text: str, tmp_path: Path) -> None:
    message = message_of(tmp_path, RANKING, (f"TrainerArgs.seed = {text}",))
    assert message.startswith("--gin-bindings 'TrainerArgs.seed = ") and len(message) < 700


def test_recomputing_needs_the_fused_layer(tmp_path: Path) -> None:
    for line in ("NetworkArgs.kernel_backend = 'pytorch'", "NetworkArgs.backbone = 'sasrec'"):
        message = message_of(tmp_path, RANKING, ("NetworkArgs.recompute_input_silu = True", line))
        assert "NetworkArgs.recompute_input_silu = True" in message and "fused layer" in message


def test_an_open_bracket_is_reported_with_its_file(tmp_path: Path) -> None:
    assert "run.gin:" in (message := message_of(tmp_path, RANKING + "TrainerArgs.seed = [3\n"))
    assert "not closed" in message


def test_a_missing_required_field_is_named(tmp_path: Path) -> None:
    message = message_of(tmp_path, RANKING.replace("NetworkArgs.num_layers = 1\n", ""))
    assert message == "NetworkArgs.num_layers is required and is not set"


def test_a_mistake_in_an_included_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", "\nTrainerArgs.seed = 'x'\n", "more.gin")
    assert f"{tmp_path / 'parts' / 'more.gin'}:2" in message_of(tmp_path, RANKING + "include 'parts/more.gin'\n")
    write(tmp_path / "parts", "\nTrainerArgs.seed = x\n", "more.gin")
    assert f"{tmp_path / 'parts' / 'more.gin'}:2" in message_of(tmp_path, RANKING + "include 'parts/more.gin'\n")


def test_a_file_that_includes_itself_is_refused(tmp_path: Path) -> None:
    assert "includes itself" in message_of(tmp_path, RANKING + "include 'run.gin'\n")


def test_a_missing_file_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"'nope.gin': no such file; shipped configs: .*synthetic_ranking.gin"):
        load_config("ranking", ["nope.gin"])


def test_bytes_that_are_no_text_are_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.gin: cannot be read as text") as caught:
        load_config("ranking", [str(tmp_path / "run.gin")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ("NetworkArgs.context_attention = 'full'", "future"),
        ("DatasetArgs.max_num_candidates = 2", "retrieval has no candidates"),
        ("RetrievalArgs.sampling_strategy = 'uniform'\nRetrievalArgs.num_negatives = -1", "must be set"),
        ("RetrievalArgs.eval_metrics = ('HR@0',)", "such as 'HR@10'"),
        ("RetrievalArgs.eval_metrics = ()", "at least one metric"),
    ],
)
def test_wrong_combinations_for_retrieval(lines: str, part: str, tmp_path: Path) -> None:
    message = message_of(tmp_path, RETRIEVAL + lines + "\n", task="retrieval")
    assert part in message and "run.gin:" in message


def test_the_mask_that_reads_the_future_is_fine_where_no_history_row_has_a_loss(tmp_path: Path) -> None:
    path = write(tmp_path, RANKING + "DatasetArgs.max_num_candidates = 3\nNetworkArgs.context_attention = 'full'\n")
    assert load_config("ranking", [path]).config.network.context_attention == "full"


def test_bindings_win_over_files_and_later_ones_over_earlier(tmp_path: Path) -> None:
    first, second = write(tmp_path, RANKING), write(tmp_path, "TrainerArgs.seed = 5\n", "second.gin")
    assert load_config("ranking", [first, second]).config.trainer.seed == 5
    loaded = load_config("ranking", [first, second], ["TrainerArgs.seed=6", "TrainerArgs.seed=7"])
    assert loaded.config.trainer.seed == 7
    assert "TrainerArgs.seed = 7" in loaded.given and "seed = 5" not in loaded.given


@pytest.mark.parametrize("in_file", ["max_history_seqlen", "max_sequence_length"])
@pytest.mark.parametrize("in_binding", ["max_history_seqlen", "max_sequence_length"])
def test_bindings_win_over_files_under_either_name(in_file: str, in_binding: str, tmp_path: Path) -> None:
    text = RANKING.replace("max_history_seqlen = 20", f"{in_file} = 20")
    loaded = load_config("ranking", [write(tmp_path, text)], [f"DatasetArgs.{in_binding}=7"])
    assert loaded.config.dataset.max_history_seqlen == 7


def test_includes_and_macros(tmp_path: Path) -> None:
    write(tmp_path, RANKING + "RATE = 0.5\nOptimizerArgs.learning_rate = %RATE\n", "base.gin")
    path = write(tmp_path, "include 'base.gin'\nTrainerArgs:\n  seed = 9\n")
    config = load_config("ranking", [path]).config
    assert (config.trainer.seed, config.optimizer.learning_rate) == (9, 0.5)
    assert load_config("ranking", [path], ["RATE = 0.25"]).config.optimizer.learning_rate == 0.25


def test_one_load_leaves_nothing_behind_for_the_next(tmp_path: Path) -> None:
    path = write(tmp_path, RANKING)
    load_config("ranking", [path], ["TrainerArgs.seed=7"])
    message_of(tmp_path, RANKING + "TrainerArgs.seed = 'x'\n")
    assert load_config("ranking", [write(tmp_path, RANKING)]).config.trainer.seed == 1234


def test_an_integer_may_stand_for_a_float_and_a_list_for_a_tuple(tmp_path: Path) -> None:
    config = load_config("ranking", [write(tmp_path, RANKING)], ["OptimizerArgs.learning_rate=1"]).config
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.ranking is not None and config.ranking.prediction_head_arch == (8, 5)


def test_published_ranking_file_loads_as_it_is(tmp_path: Path) -> None:
    loaded = load_config("ranking", [write(tmp_path, PUBLISHED_RANKING)])
    config = loaded.config
    assert (config.dataset.max_history_seqlen, config.dataset.max_num_candidates) == (200, 20)
    assert config.trainer.max_train_iters == 1000 and config.trainer.profile
    assert config.ranking is not None and config.ranking.is_multiclass
    assert len(loaded.notes) == 1 and config.trainer.pipeline_type == "native"
    assert any("DatasetArgs.max_sequence_length" in note for note in loaded.notes)


def test_published_retrieval_file_loads_as_it_is(tmp_path: Path) -> None:
    loaded = load_config("retrieval", [write(tmp_path, PUBLISHED_RETRIEVAL)])
    config = loaded.config
    assert (config.dataset.max_history_seqlen, config.network.hidden_dropout) == (200, 0.0)
    assert config.retrieval is not None and config.retrieval.negatives == "uniform"
    assert config.eval_metrics == ("NDCG@10", "NDCG@20", "HR@10")
    assert len(loaded.notes) == 1 and "max_sequence_length" in loaded.notes[0]


@pytest.mark.parametrize(("task", "text"), [("ranking", PUBLISHED_RANKING), ("retrieval", PUBLISHED_RETRIEVAL)])
def test_shipped_movielens_configs_are_the_published_ones(task: str, text: str, tmp_path: Path) -> None:
    published = load_config(task, [write(tmp_path, text)]).config  # type: ignore[arg-type]
    shipped = load_config(task, [f"movielen_{task}.gin"]).config  # type: ignore[arg-type]
    unprofiled = dataclasses.replace(published.trainer, profile=False)
    assert shipped == dataclasses.replace(published, trainer=unprofiled)


@pytest.mark.parametrize(
    "line",
    [
        "TrainerArgs.ckpt_save_dir = './x'",
        "TrainerArgs.ckpt_load_dir = './x'",
        "NetworkArgs.embedding_backend = 'FBGEMM'",
        "NetworkArgs.kernel_backend = 'cutlass'",
    ],
)
def test_an_option_without_meaning_here_costs_one_line(line: str, tmp_path: Path) -> None:
    notes = load_config("ranking", [write(tmp_path, RANKING + line + "\n")]).notes
    assert len(notes) == 1 and notes[0].startswith(line) and "\n" not in notes[0]


def test_the_other_task_is_noted(tmp_path: Path) -> None:
    notes = load_config("ranking", [write(tmp_path, RANKING + "RetrievalArgs.num_negatives = 4\n")]).notes
    assert notes == ("RetrievalArgs is not used by the ranking task",)


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_operative_and_given_texts_load_to_an_equal_config(task: str, tmp_path: Path) -> None:
    bindings = (
        "OptimizerArgs.learning_rate=1e-7",
        "DatasetArgs.contextual_feature_names=('a b', \"it's\")",
        "EmbeddingArgs.table_sharding_types={'item': 'table_wise'}",
        "DatasetArgs.actions_without_loss=(1, 2.5, 'a')",
        "TrainerArgs.loggers=()",
        "TrainerArgs.max_epochs=None",
    )
    loaded = load_config(task, [write(tmp_path, TEXTS[task])], bindings)  # type: ignore[arg-type]
    for text in (loaded.operative, loaded.given):
        again = load_config(task, [write(tmp_path, text, "again.gin")])  # type: ignore[arg-type]
        assert again.config == loaded.config and again.notes == ()
        assert again.operative == loaded.operative
    every_field = {line.split(" = ")[0] for line in loaded.operative.splitlines() if line}
    for member in dataclasses.fields(loaded.config):
        if (owner := getattr(loaded.config, member.name)) is not None:
            assert {f"{type(owner).__name__}.{f.name}" for f in dataclasses.fields(owner)} <= every_field


SHIPPED = sorted(path.name for path in CONFIG_DIRECTORY.glob("*.gin"))


def lines_of(name: str) -> dict[str, str]:
    """Return the value of each field of a shipped config as it is written, those of the files it includes first."""
    lines: dict[str, str] = {}
    text = re.sub(r"([(,])\n\s+", r"\1 ", (CONFIG_DIRECTORY / name).read_text())  # long values go on in the next line
    for line in text.splitlines():
        if included := re.fullmatch(r"include '(.+)'", line):
            lines |= lines_of(included[1])
        elif line and not line.startswith("#"):
            field, value = line.split(" = ", 1)
            lines[field] = value
    return lines


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads_to_what_its_lines_say(name: str) -> None:
    task = "ranking" if "ranking" in name else "retrieval"
    loaded = load_config(task, [name])  # type: ignore[arg-type]
    assert loaded.notes == () and loaded.config.task == task
    values = {type(owner).__name__: owner for owner in vars(loaded.config).values()}
    lines = lines_of(name)
    assert len(lines) > 5
    for line, value in lines.items():
        owner, field = line.split(".")
        wanted = ast.literal_eval(value)
        assert getattr(values[owner], field) == (tuple(wanted) if isinstance(wanted, list) else wanted), line


def test_the_shipped_configs_are_all_there() -> None:
    wanted = {f"{data}_{task}.gin" for data in ("synthetic", "ml_100k", "custom", "movielen")
              for task in ("ranking", "retrieval")}  # fmt: skip
    assert wanted <= set(SHIPPED)


# Fields for which None or -1 is a value of its own, or is decided by the data (and then written by the trainer).
NOTHING = {
    "TrainerArgs": {"max_train_iters", "max_epochs", "max_eval_iters", "ckpt_save_interval", "init_from",
                    "wandb_group"},
    "DatasetArgs": {"dataset_path", "contextual_feature_names", "last_window", "temporal_cuts", "train_stride",
                    "sessions", "history_start", "history_end"},
    "NetworkArgs": {"max_attn_len", "num_position_buckets", "scaling_seqlen", "item_embedding"},
    "FeatureArgs": {"event_features", "item_features", "merge_hidden_size", "layer_norm"},
    "RetrievalArgs": {"num_negatives", "filter_seen", "closest_negative"},
    "DynamicEmbeddingArgs": {"ttl"},
    "ItemTextArgs": {"model", "columns", "pooling"},
    "MemoryArgs": {"insert_method", "pretrain_item_num", "recent_item_num"},
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_every_default_is_resolved_in_the_config(name: str) -> None:
    config = load_config("ranking" if "ranking" in name else "retrieval", [name]).config
    unused = {field for field, (_, users, _) in _USES.items() if config.network.backbone not in users}
    unused |= {"sampling_strategy"} if config.retrieval and config.retrieval.loss != "sampled_softmax" else set()
    for member in dataclasses.fields(config):
        if (owner := getattr(config, member.name)) is not None:
            unset = {f.name for f in dataclasses.fields(owner) if getattr(owner, f.name) in (None, -1)}
            assert unset <= NOTHING.get(type(owner).__name__, set()) | unused
    assert config.trainer.max_epochs or config.trainer.max_train_iters


WIDTH = ("NetworkArgs.hidden_size=48", "NetworkArgs.kv_channels=6", "NetworkArgs.hidden_dropout=0.3")
RATES = ("OptimizerArgs.optimizer_str='adamw'", "OptimizerArgs.learning_rate=0.5", "OptimizerArgs.warmup_steps=7",
         "OptimizerArgs.min_learning_rate=0.25", "OptimizerArgs.sparse_learning_rate=2.0")  # fmt: skip
RESOLVED: list[tuple[str, tuple[str, ...], str, dict[str, object]]] = [
    ("retrieval", WIDTH, "network", {"relative_position_bias": False, "relative_time_bias": False, "gate": "mul",
     "norm_epsilon": 1e-5, "value_channels": 6, "scale_inputs": True, "input_dropout": 0.3, "item_embedding_dim": 48,
     "token_layout": "item", "output_norm": "l2", "is_causal": True, "ffn_hidden_size": None}),
    ("ranking", ("NetworkArgs.preset='research'", "NetworkArgs.gate='concat'"), "network",
     {"relative_position_bias": True, "relative_time_bias": True, "gate": "concat", "norm_epsilon": 1e-6,
      "token_layout": "interleave", "output_norm": "layer_norm"}),
    ("retrieval", ("NetworkArgs.backbone='sasrec'", *WIDTH), "network",
     {"ffn_hidden_size": 48, "norm_placement": "pre", "scale_inputs": True, "gate": None, "value_channels": None}),
    ("retrieval", ("NetworkArgs.backbone='llama'", *WIDTH), "network",
     {"ffn_hidden_size": 128, "num_query_groups": 2, "scale_inputs": False, "num_position_buckets": None}),
    ("retrieval", ("NetworkArgs.backbone='bert'", *WIDTH), "network",
     {"ffn_hidden_size": 192, "norm_placement": "post", "scale_inputs": False, "is_causal": False}),
    ("retrieval", ("NetworkArgs.backbone='gru'",), "network", {"scale_inputs": False, "ffn_hidden_size": None}),
    ("retrieval", ("NetworkArgs.backbone='hf:bert'", *WIDTH), "network",
     {"ffn_hidden_size": 192, "scale_inputs": False, "is_causal": True}),
    ("retrieval", RATES, "optimizer", {"sparse_optimizer_str": "adam", "sparse_warmup_steps": 7,
     "sparse_lr_schedule": "constant", "sparse_min_learning_rate": 1.0, "sparse_learning_rate": 2.0}),
    ("retrieval", ("RetrievalArgs.num_negatives=-1",), "retrieval", {"sampling_strategy": "in_batch"}),
    ("retrieval", ("RetrievalArgs.num_negatives=3",), "retrieval", {"sampling_strategy": "uniform"}),
    ("retrieval", (), "trainer", {"max_epochs": 1}),
    ("retrieval", ("TrainerArgs.max_train_iters=3",), "trainer", {"max_epochs": None}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "lines", "member", "fields"), RESOLVED)
def test_a_default_is_the_documented_one(
    task: str, lines: tuple[str, ...], member: str, fields: dict[str, object], tmp_path: Path
) -> None:
    owner = getattr(load_config(task, [write(tmp_path, TEXTS[task])], lines).config, member)  # type: ignore[arg-type]
    assert {name: getattr(owner, name) for name in fields} == fields


def test_dynamic_tables_of_the_reference(tmp_path: Path) -> None:
    lines = ["table_name = 'item_id'", "item_vocab_size_or_capacity = 5000", "evict_strategy = 'LFU'"]
    lines += ["item_vocab_gpu_capacity_ratio = 0.5", "caching = True"]
    loaded = load_config("ranking", [write(tmp_path, RANKING)], [f"DynamicEmbeddingArgs.{line}" for line in lines])
    args = loaded.config.dynamic_embedding
    assert (args.capacity, args.evict_strategy, len(loaded.notes)) == ({"item_id": 5000}, "lfu", 4)
    with pytest.raises(ConfigError, match=r"table_name = 'item_id': .* go together"):
        load_config("ranking", [write(tmp_path, RANKING)], [f"DynamicEmbeddingArgs.{lines[0]}"])
