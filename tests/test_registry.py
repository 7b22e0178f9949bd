"""Backbones, losses, encoders and readers of a user's own: registered, imported, checked, trained, asked again."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import nn

import hstu
from hstu.config import ConfigError, load_config
from hstu.config.backbones import CUSTOM_BACKBONES
from hstu.config.features import CUSTOM_ENCODERS
from hstu.config.retrieval import CUSTOM_LOSSES
from hstu.data.files import FileFormat, read_table
from hstu.data.files.formats import CUSTOM_READERS
from hstu.layers.feature_encoders import QuantileNormalize
from hstu.layers.similarity import DotProduct, MixtureOfLogits
from hstu.models import build_model
from hstu.models.backbone import make_backbone
from hstu.models.custom import custom_loss, make_custom_encoder
from hstu.models.losses import SampledCandidates, softmax_loss
from hstu.registry import Registry
from tests.launch import ROOT, entrypoint, forked
from tests.samples import declared_features, make_config, make_dataset
from tests.tiny import BINDINGS, write_tiny

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registrations and imports of a test end with it, and it meets none of others."""
    for registry in (CUSTOM_BACKBONES, CUSTOM_ENCODERS, CUSTOM_LOSSES, CUSTOM_READERS):
        monkeypatch.setattr(registry, "_parts", {})
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == EXAMPLES:
            del sys.modules[name]


def example(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


def network(*bindings: str):
    return load_config("retrieval", (), [*BINDINGS["retrieval"], *bindings]).config.network


@pytest.mark.parametrize("name", ["custom_backbone", "custom_loss"])
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    example(name, monkeypatch).main()
    run = hstu.open_run(tmp_path / "runs" / name.replace("_", "-"))
    assert (run.path / "operative.gin").read_text().startswith(f"import {name}\n")
    assert run.evaluate()["metrics"] == run.scores


def test_the_example_of_a_loop_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert example("own_training_loop", monkeypatch).main(steps=100) > 0.9  # 1.0 measured; 0.02 by chance


def train_on_one_rank_and_two(place: Path, module: str, lines: tuple[str, ...]) -> None:
    """Train four steps with what ``module`` registers, into ``run1`` and ``run2``: the losses are the same."""
    losses = []
    for ranks in (1, 2):
        flags = [f"--gin-bindings={line}" for line in (*lines, f"TrainerArgs.train_batch_size={32 // ranks}")]
        flags += ["--import", module, "--gin-config-file=custom_retrieval.gin", "--run-dir", f"run{ranks}"]
        done = entrypoint()("retrieval", *flags, cwd=place, ranks=ranks)
        assert done.code == 0, done.err
        records = map(json.loads, (place / f"run{ranks}" / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if record["kind"] == "train"])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_from_the_commands_on_one_rank_and_two(tmp_path: Path) -> None:
    """The import is found in the working directory and remembered; the losses of two ranks are those of one."""
    shutil.copy(EXAMPLES / "custom_backbone.py", tmp_path)
    write_tiny(tmp_path / "tmp_data" / "synthetic", num_users=60)
    lines = (*BINDINGS["retrieval"], "NetworkArgs.backbone='average'", "TrainerArgs.max_train_iters=4",
             "TrainerArgs.log_interval=1", "DatasetArgs.shuffle=False")  # fmt: skip
    train_on_one_rank_and_two(tmp_path, "custom_backbone", lines)
    done = entrypoint()("retrieval", "--run-dir", "run1", "--gin-bindings=TrainerArgs.max_train_iters=5", cwd=tmp_path)
    assert done.code == 0 and "resumed from" in done.out, done.err
    done = forked("hstu.cli.predict", "--run-dir", "run1", "--output", "p.parquet", cwd=tmp_path)
    assert done.code == 0 and pl.read_parquet(tmp_path / "p.parquet").height == 600, done.err
    (tmp_path / "custom_backbone.py").rename(tmp_path / "gone.py")
    done = forked("hstu.cli.predict", "--run-dir", "run1", "--output", "p.parquet", cwd=tmp_path)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "import custom_backbone: No module named 'custom_backbone'; it is looked for in" in done.err


class Sums(nn.Module):
    """A running sum over the whole batch: causal, but blind to where a sample begins."""

    def __init__(self, network, max_tokens: int, step: int = 1) -> None:
        super().__init__()
        self.step = step

    def forward(self, tokens):
        return tokens.values.cumsum(0)


def later(tokens):
    return tokens.values + tokens.values.roll(-1, 0) * (torch.arange(len(tokens.values)) < 4)[:, None]


class Normed(nn.BatchNorm1d):
    def forward(self, tokens):
        return super().forward(tokens if isinstance(tokens, torch.Tensor) else tokens.values)


def module_of(function):
    return lambda network, max_tokens: type(
        "Module", (nn.Module,), {"forward": lambda self, tokens: function(tokens)}
    )()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Sums, "mixes samples"),
        (module_of(later), "is not causal"),
        (lambda network, max_tokens: Normed(network.hidden_size), "mixes samples"),  # in training alone
        (module_of(lambda tokens: tokens.values[:-1]), r"maps tokens \[6, 16\] to \[5, 16\]"),
        (module_of(lambda tokens: tokens.values / 0), "gives numbers that are not finite"),
        (module_of(lambda tokens: tokens.nothing), "fails with AttributeError"),
        (lambda network, max_tokens: 3, "gave a int; it must return a torch.nn.Module"),
        (lambda: None, "fails with TypeError"),
    ],
)
def test_a_backbone_that_cannot_be_one_is_told(make, words: str) -> None:
    hstu.register_backbone("mine")(make)
    with pytest.raises(ConfigError, match=rf"NetworkArgs.backbone = 'mine': {words}"):
        make_backbone(network("NetworkArgs.backbone='mine'"), 17)


def test_what_a_backbone_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    hstu.register_backbone("plain")(Sums)
    hstu.register_backbone("windowed", uses=("max_attn_len",))(Sums)
    assert network("NetworkArgs.backbone='windowed'", "NetworkArgs.max_attn_len=3").max_attn_len == 3
    for lines, words in (
        (("NetworkArgs.backbone='plain'", "NetworkArgs.max_attn_len=3"), "max_attn_len = 3: belongs to"),
        (("NetworkArgs.backbone='plane'",), "'plain'.* 'windowed'; one of your own"),
        (("NetworkArgs.backbone_options={'a': 1}",), "are those of a registered backbone, which hstu is not"),
        (("NetworkArgs.backbone='plain'", "ContextParallelArgs.context_parallel_size=2"), "needs whole sequences"),
        (("NetworkArgs.backbone='plain'", "TensorModelParallelArgs.tensor_model_parallel_size=2"), "cannot be cut"),
    ):
        with pytest.raises(ConfigError, match=words):
            network(*lines)
    with pytest.raises(ConfigError, match="fails with TypeError.*'steps'"):
        make_backbone(network("NetworkArgs.backbone='plain'", "NetworkArgs.backbone_options={'steps': 2}"), 17)


ENCODERS = """
import hstu, torch
from torch import nn

@hstu.register_encoder("squares")
class Squares(nn.Module):
    def __init__(self, feature, width, *, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(2 * (feature.width or 1), width))
        self.missing = nn.Parameter(torch.randn(width))
        self.drop = nn.Dropout(0.0)

    def forward(self, numbers):
        missing, x = numbers.isnan().any(1, keepdim=True), numbers.nan_to_num()
        return torch.where(missing, self.missing, self.drop(torch.cat([x, x * x], 1) @ self.weight))

@hstu.register_encoder("gated")
class Gated(nn.Module):
    def __init__(self, feature, width):
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, rows, lengths):
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        return rows.new_zeros(len(lengths), rows.shape[1]).index_add(0, owner, rows * self.gate(rows).sigmoid())
"""
CHOSEN = "FeatureArgs.encoders={'price': 'squares', 'image': 'squares', 'genres': 'gated', 'likes': 'gated'}"


@pytest.mark.slow
def test_encoders_from_the_commands_on_one_rank_and_two(tmp_path: Path) -> None:
    """They are checkpointed, found again by what opens the run, and learn on two ranks what they learn on one."""
    (tmp_path / "my_encoders.py").write_text(ENCODERS)
    make_dataset(tmp_path / "tmp_data" / "synthetic", [7, 5, 9, 12] * 15, declared=declared_features())
    lines = (*BINDINGS["retrieval"], CHOSEN, "FeatureArgs.encoder_options={'price': {'scale': 0.5}}",
             "TrainerArgs.max_train_iters=4", "TrainerArgs.log_interval=1", "DatasetArgs.shuffle=False",
             "NetworkArgs.item_embedding='both'", "DatasetArgs.contextual_feature_names=None")  # fmt: skip
    train_on_one_rank_and_two(tmp_path, "my_encoders", lines)
    done = entrypoint()("retrieval", "--run-dir", "run1", "--mode", "eval", cwd=tmp_path)
    assert done.code == 0, done.err
    done = forked("hstu.cli.predict", "--run-dir", "run1", "--output", "p.parquet", cwd=tmp_path)
    assert done.code == 0 and pl.read_parquet(tmp_path / "p.parquet").height == 600, done.err


def encoder_args(*lines: str):
    return load_config("retrieval", (), [*BINDINGS["retrieval"], *lines]).config.feature


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_encoders.py").write_text(ENCODERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("my_encoders")
    del sys.modules["my_encoders"]


def test_models_read_features_through_registered_encoders(tmp_path: Path, registered) -> None:
    """Of events, items and users, numbers scaled first; the config says where they come from."""
    dataset = make_dataset(tmp_path / "small", (3, 4, 12), declared=declared_features())
    lines = (CHOSEN, "FeatureArgs.number_scaling='quantile'", "DatasetArgs.contextual_feature_names=None")
    assert load_config("retrieval", (), [*BINDINGS["retrieval"], CHOSEN]).operative.startswith("import my_encoders\n")
    model = build_model(make_config("retrieval", *lines), dataset.schema)
    assert model.item_encoder is not None
    events, items, users = model.feature_tokens.events, model.item_encoder.encoders, model.feature_tokens.users
    scaling, squares = events.encoders["price"]
    assert isinstance(scaling, QuantileNormalize) and isinstance(squares, registered.Squares)
    assert isinstance(items.encoders["image"], registered.Squares)
    assert isinstance(items.encoders["genres"], registered.Gated) and isinstance(
        users.encoders["likes"], registered.Gated
    )
    number = torch.tensor([[0.3], [torch.nan]])
    x = scaling(number[:1])
    wanted = torch.cat([torch.cat([x, x * x], 1) @ squares.weight, squares.missing[None]])
    assert torch.equal(events.encoders("price", number), wanted)
    rows, lengths = torch.randn(3, 8), torch.tensor([2, 0, 1])
    gated = items.encoders["genres"]
    kinds = {f.name: f.kind for f in items.features}
    given = {name: rows for name, kind in kinds.items() if kind in ("multi", "categorical")}
    numbers = {f.name: torch.zeros(3, f.width or 1) for f in items.features if f.kind in ("numeric", "vector")}
    assert torch.equal(items(given, {"genres": lengths}, numbers)["genres"], gated(rows, lengths))


def encoder_of(function):
    return lambda feature, width: type("Module", (nn.Module,), {"forward": lambda self, *given: function(*given)})()


class Careless(nn.Module):
    """Its vectors are finite; where a number is missing its gradient is not."""

    def __init__(self, feature, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, numbers):
        return torch.where(numbers.isnan(), 0.0, numbers * self.weight)


@pytest.mark.parametrize(
    ("feature", "make", "words"),
    [
        ("price", lambda feature, width: nn.Linear(1, 6), "gives numbers that are not finite"),
        ("price", encoder_of(lambda x: x.nan_to_num().cumsum(0).expand(-1, 6)), "mixes events"),
        ("price", lambda feature, width: nn.Sequential(Filled(), nn.Linear(1, 6), Normed(6)), "mixes events"),
        ("price", encoder_of(lambda x: x.nan_to_num()), r"maps numbers \[4, 1\] to \[4, 1\]; it must give \[4, 6\]"),
        (
            "price",
            encoder_of(lambda x: x.nan_to_num().expand(-1, 6) / len(x) if len(x) else 3),
            "maps numbers .* to int",
        ),
        ("price", Careless, "has gradients that are not finite where a value is missing"),
        ("price", lambda feature: None, "fails with TypeError"),
        ("genres", encoder_of(lambda rows, lengths: rows), r"maps rows \[4, 6\] of sets to \[4, 6\]"),
        ("genres", encoder_of(lambda rows, lengths: rows.cumsum(0)[lengths.cumsum(0) - 1]), "mixes events"),
        ("genres", encoder_of(lambda rows: rows), "fails with TypeError"),
    ],
)
def test_an_encoder_that_cannot_be_one_is_told(feature: str, make, words: str) -> None:
    hstu.register_encoder("mine")(make)
    declared = next(one for one in declared_features() if one.name == feature)
    with pytest.raises(ConfigError, match=rf"FeatureArgs.encoders = .*: that of '{feature}' {words}"):
        make_custom_encoder(declared, 6, encoder_args(f"FeatureArgs.encoders={{{feature!r}: 'mine'}}"))


class Filled(nn.Module):
    def forward(self, numbers):
        return numbers.nan_to_num()


def test_trying_out_leaves_no_trace() -> None:
    class Own(nn.Module):
        def __init__(self, feature, width: int) -> None:
            super().__init__()
            self.calls: torch.Tensor
            self.register_buffer("calls", torch.zeros(1))
            self.frozen = nn.Dropout(0.5).eval()

        def forward(self, numbers):
            self.calls += 1
            return self.frozen(numbers.nan_to_num()).expand(-1, 6)

    hstu.register_encoder("mine")(Own)
    price = next(one for one in declared_features() if one.name == "price")
    before = torch.get_rng_state()
    module = make_custom_encoder(price, 6, encoder_args("FeatureArgs.encoders={'price': 'mine'}"))
    assert torch.equal(before, torch.get_rng_state())
    assert module.calls == 0 and module.training and not module.frozen.training


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{'price': 'mime'}"], "'mime' is not registered ('mine' so far); one of your own"),
        (["{'price': 'mine'}", "FeatureArgs.number_encodings={'price': 'raw'}"], "stands in number_encodings too"),
        (["{}", "FeatureArgs.encoder_options={'price': {'a': 1}}"], "'price' has no registered encoder"),
        (["{'device': 'mine'}"], "feature 'device' is categorical; those that are numeric or vector or multi have"),
        (["{'prise': 'mine'}"], "the model reads no feature 'prise'"),
        (["{}", "FeatureArgs.number_encodings={'place': 'raw'}"], "feature 'place' is vector; those that are numeric"),
    ],
)
def test_what_may_have_an_encoder(lines: list[str], words: str, tmp_path: Path) -> None:
    hstu.register_encoder("mine")(Careless)
    dataset = make_dataset(tmp_path / "small", (3, 4), declared=declared_features())
    with pytest.raises(ConfigError, match=re.escape(words)):
        build_model(make_config("retrieval", f"FeatureArgs.encoders={lines[0]}", *lines[1:]), dataset.schema)


def candidates(columns: bool, mixture: bool):
    torch.manual_seed(0)
    similarity = DotProduct(normalize_queries=False, normalize_items=False, eps=1e-6)
    if mixture:
        similarity = MixtureOfLogits(
            8, query_groups=2, item_groups=2, channels=4, gate_channels=4, dropout=0.0, eps=1e-6
        )
    sampled = SampledCandidates(
        query=similarity.queries(torch.randn(5, 8)),
        positive=similarity.items(torch.randn(5, 8)),
        positive_ids=torch.tensor([0, 1, 2, 3, 9]),
        pool=similarity.items(torch.randn(4, 8)),
        pool_ids=torch.tensor([0, 1, 2, 7]),
        columns=torch.tensor([[0, 3], [1, 2], [0, 1], [3, 3], [2, 1]]) if columns else None,
    )
    return sampled, similarity


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_a_registered_loss_sees_what_the_softmax_sees(columns: bool, mixture: bool) -> None:
    @hstu.register_loss("mine")
    def mine(positive, negative, live, *, scale: float = 1.0):
        negative = negative.masked_fill(~live, float("-inf"))
        return scale * (torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive)

    lines = [*BINDINGS["retrieval"], "RetrievalArgs.loss='mine'", "RetrievalArgs.loss_options={'scale': 2.0}"]
    args = load_config("retrieval", (), lines).config.retrieval
    assert args is not None and args.negatives == "uniform"
    sampled, similarity = candidates(columns, mixture)
    found = custom_loss(args, sampled, similarity, temperature=args.temperature)
    known = softmax_loss(sampled, similarity, temperature=args.temperature)
    assert torch.allclose(found.total, 2 * known.total, rtol=1e-5) and found.count == 5
    assert found.live_negatives == known.live_negatives
    nobody = custom_loss(args, sampled.rows(0, 0), similarity, temperature=args.temperature)
    assert nobody.count == 0 and nobody.total == 0


def test_the_example_of_a_loss_is_a_hinge(monkeypatch: pytest.MonkeyPatch) -> None:
    hinge = example("custom_loss", monkeypatch).hinge
    positive, negative = torch.tensor([1.0, 2.0]), torch.tensor([[0.5, -1.0], [3.0, 0.0]])
    live = torch.tensor([[True, True], [True, False]])
    assert hinge(positive, negative, live).tolist() == [0.25, 1.0]
    assert hinge(positive, negative, live, margin=4.0, hardest=1).tolist() == [3.5, 5.0]
    assert hinge(positive, negative, live & False).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda positive, negative, live: positive.sum(), r"returned \[\] for 5 label tokens"),
        (lambda positive, negative, live: 3.0, "returned float for 5"),
        (lambda positive: positive, "fails with TypeError"),
    ],
)
def test_a_loss_that_cannot_be_one_is_told(loss, words: str) -> None:
    hstu.register_loss("mine")(loss)
    args = load_config("retrieval", (), [*BINDINGS["retrieval"], "RetrievalArgs.loss='mine'"]).config.retrieval
    with pytest.raises(ConfigError, match=f"RetrievalArgs.loss = 'mine': {words}"):
        custom_loss(args, *candidates(True, False), temperature=1.0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("RetrievalArgs.loss='mime'", "'bpr_max'; one of your own"),
        ("RetrievalArgs.loss_options={'a': 1}", "'a' is none of sampled_softmax"),
        ("import no_such_module", "import no_such_module: No module named 'no_such_module'; it is looked for in"),
        ("import broken", "import broken: failed with ZeroDivisionError"),
    ],
)
def test_mistakes_in_configs(line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        load_config("retrieval", (), [*BINDINGS["retrieval"], line])


def test_gin_files_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests_of_a_backbone.py").write_text(
        "import hstu\nfrom torch import nn\n\n@hstu.register_backbone('imported')\nclass Mine(nn.Module):\n    pass\n"
    )
    lines = "\n".join(("import tests_of_a_backbone", *BINDINGS["retrieval"], "NetworkArgs.backbone='imported'"))
    (tmp_path / "a.gin").write_text(lines)
    monkeypatch.chdir(tmp_path)
    loaded = load_config("retrieval", ["a.gin"])
    assert loaded.imports == ("tests_of_a_backbone",)
    for text in (loaded.given, loaded.operative):
        assert text.startswith("import tests_of_a_backbone\n")


def test_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log_reader.py").write_text(
        "import hstu, polars as pl\n\n@hstu.register_reader('arrows')\ndef read(path):\n"
        "    for line in path.read_text().splitlines():\n"
        "        user, items = line.split(' -> ')\n"
        "        items = items.split()\n"
        "        yield pl.DataFrame({'user': [user] * len(items), 'item': items})\n"
    )
    for part, first in (("a", "u1"), ("b", "u2")):
        (tmp_path / f"{part}.log").write_text(f"{first} -> i1 i2 i3\n{first}x -> i3 i2 i1 i4\n")
    flags = ["--dataset_name", "custom", "--name", "arrows", "--user_column", "user", "--item_column", "item"]
    flags += ["--interactions", "*.log", "--format", "arrows"]
    done = forked(ROOT / "preprocessing" / "preprocessor.py", *flags, cwd=tmp_path)
    assert done.code == 2 and "--format is 'arrows', must be one of csv" in done.err
    done = forked(ROOT / "preprocessing" / "preprocessor.py", "--import", "log_reader", *flags, cwd=tmp_path)
    assert done.code == 0, done.err
    counts = json.loads((tmp_path / "tmp_data" / "arrows" / "schema.json").read_text())["counts"]
    assert (counts["users"], counts["items"], counts["events"]) == (4, 4, 14)


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda path: [3], "gave a int, not a polars.DataFrame"),
        (lambda path: path.nothing, "fails with AttributeError"),
        (lambda path: iter([pl.DataFrame({"user": [1]})]), "column 'item' is missing; present: user"),
        (lambda path: [pl.DataFrame({"user": [1], "item": [1]}), pl.DataFrame({"item": [1]})], "gave columns"),
    ],
)
def test_a_reader_that_cannot_be_one_is_told(read, words: str, tmp_path: Path) -> None:
    hstu.register_reader("mine")(read)
    (tmp_path / "a.log").write_text("")
    with pytest.raises(ValueError, match=words):
        read_table(tmp_path / "a.log", ["user", "item"], FileFormat(format="mine"))
    with pytest.raises(ValueError, match="is read as mine, to which --encoding does not apply"):
        read_table(tmp_path / "a.log", ["user", "item"], FileFormat(format="mine", encoding="utf-8"))


def test_names() -> None:
    registry = Registry("backbone", ["hstu"])

    def first() -> None: ...

    assert registry.add("mine")(first) is first and registry.names == ("mine",)
    registry.add("mine")(first)  # a cell that runs again
    other = type(first)(first.__code__, {}, "other")
    other.__module__ = "elsewhere"
    for name, make, words in (
        ("hstu", first, "is the name of a shipped one"),
        ("my-own", first, "letters, digits and underscores"),
        ("mine", other, "is registered by .* too"),
        ("three", 3, "is a int, which cannot be called"),
    ):
        with pytest.raises(ValueError, match=words):
            registry.add(name)(make)
    with pytest.raises(ValueError, match="uses = 'max_attention'"):
        hstu.register_backbone("mine", uses=("max_attention",))
