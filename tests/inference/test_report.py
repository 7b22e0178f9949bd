"""The page about runs: what it says is what the runs say, it stands alone, and a browser shows it."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import hstu
from hstu.cli import report
from hstu.inference.attention import WHOLE_LAYERS, attention_pictures, write_attention
from hstu.inference.opened import open_trained
from hstu.inference.prediction_requests import RequestSpec
from hstu.inference.report import write
from hstu.interrupt import Stopped
from hstu.parallel import Mesh
from tests.inference.test_predict import planted_log
from tests.launch import ROOT, torchrun_command
from tests.launch import run as launched
from tests.tiny import BINDINGS, write_tiny

NAMES = dict(user="who", item="what", time="when", action="did")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``a`` and ``b`` of retrieval, whose names would break a page, and ``c`` of ranking."""
    path = tmp_path_factory.mktemp("report")
    events, _ = planted_log()
    for task, lines in BINDINGS.items():
        (path / f"{task}.gin").write_text(
            "\n".join((*lines, "TrainerArgs.eval_interval=4", "TrainerArgs.log_interval=4"))
        )
    titles = pl.DataFrame({"what": [f"sku {n}" for n in range(60)], "title": [f"Lamp & {n}" for n in range(60)]})
    for name, task, made in (("a", "retrieval", True), ("b", "retrieval", True), ("c", "ranking", False)):
        options: dict = {"TrainerArgs.max_train_iters": 12, "TrainerArgs.report": made}
        if name == "b":
            options |= {"NetworkArgs.hidden_size": 32, "items": titles, "item_features": "title:text"}
        config = str(path / f"{task}.gin")
        hstu.fit(events, **NAMES, config=config, run_dir=path / name, verbose=False, **options)
    baselines = {"popularity": {"HR@10": 0.1234, "NDCG@10": 0.05}}
    (path / "a" / "baselines.json").write_text(json.dumps({"baselines": baselines}))
    return path


class Page(HTMLParser):
    """Ids, links, sources, and the text of a page, its tags balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links, self.open, self.words = list[str](), list[str](), list[str]()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.html = path.read_text()
        self.feed(self.html)
        assert self.open == [], "every tag is closed"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self.ids |= {given["id"]} if given.get("id") else set()
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def made(home: Path, output: Path, *flags: str) -> Page:
    assert report.main([*(str(home / name) for name in "abc"), "--output", str(output), *flags]) == 0
    return Page(output)


def test_it_is_made_at_the_end_unless_told_not_to(home: Path) -> None:
    assert {name for name in "abc" if (home / name / "report.html").is_file()} == {"a", "b"}
    assert "report: " in (home / "a" / "train.log").read_text()


def test_at_the_end_too_items_have_the_names_that_the_data_set_knows(home: Path) -> None:
    named, other = (Page(home / name / "report.html").html.split('id="examples"')[1] for name in "ba")
    shown = re.findall(r"<li(?: class=hit)?>([^<]*sku [^<]*)", named)
    assert len(shown) > 100 and all(re.fullmatch(r"Lamp &amp; (\d+) \(sku \1\)\s*", item) for item in shown)
    assert "Then: <strong>Lamp &amp; " in named and "Lamp" not in other


def test_what_keeps_it_from_being_made_does_not_fail_the_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(error: BaseException) -> None:
        raise error

    before = (home / "a" / "report.html").read_bytes()
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)
    for error, words in ((ValueError("a reason"), "a reason"), (Stopped(2), "interrupted: ")):
        monkeypatch.setattr(write, "write_report", lambda *_, error=error: fail(error))
        write.report_at_end(home / "a", Mesh.of_process())
        assert words in caplog.records[-1].getMessage() and "was not written" in caplog.records[-1].getMessage()
    assert (home / "a" / "report.html").read_bytes() == before


def test_it_says_what_the_runs_say_and_stands_alone(home: Path, tmp_path: Path) -> None:
    page = made(home, tmp_path / "deep" / "report.html")
    assert all(link.startswith(("#", "data:")) for link in page.links) and "<script" not in page.html
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert {"scores", "curves", "data", "examples", "settings", "speed"} <= page.ids
    for name in "abc":
        record = json.loads((home / name / "eval.json").read_text())
        for metric, value in record["metrics"].items():
            assert f"{value:.4f} ± {record['standard_errors'][metric]:.4f}" in page.text
    assert "popularity 0.1234 0.0500" in page.text and "90 users, 60 items" in page.text
    differing = page.html.split("Fields in which the runs differ")[2].split("</table>")[0]
    assert "NetworkArgs.hidden_size" in differing and "TrainerArgs.seed" not in differing
    assert page.html.count("<polyline") >= 3 + 2 * 2 + 1, "losses, and what was validated"
    assert "tokens a second" in page.text and "most memory" in page.text


def test_the_examples_are_those_of_the_test_split(home: Path, tmp_path: Path) -> None:
    page = made(home, tmp_path / "report.html")
    run = hstu.open_run(home / "a", frames="polars")
    answers = run.recommend(split="test", k=10)
    events, _ = planted_log()
    section = page.html.split('id="examples"')[1].split("<h3>b</h3>")[0]
    cards = re.findall(r"<details open><summary>user (\S+), (\d+) events</summary>(.*?)</details>", section, re.DOTALL)
    assert len(cards) == 10
    for user, length, body in cards:
        mine, items = answers.filter(pl.col("user") == user), events.filter(pl.col("who") == user)["what"].to_list()
        assert int(length) == len(items) - 1
        shown = re.findall(r"<li>([^<]*)</li>", body.split("<ol>")[0])
        assert shown == items[:-1][-8:] and f"<strong>{items[-1]}</strong>" in body
        assert re.findall(r"<li(?: class=hit)?>(sku \d+) ", body) == mine["item"].to_list()
        hits = re.findall(r"<li class=hit>(sku \d+) ", body)
        assert hits == [item for item in mine["item"] if item == items[-1]]
        assert ("recommended at rank" in body) == bool(hits)
    ranking = page.html.split("<h3>c</h3>")[-1]
    assert len(re.findall(r"Shown: sku \d+\. What happened: \d\.", ranking)) == 10


def test_names_of_items_are_text(home: Path, tmp_path: Path) -> None:
    table = pl.DataFrame(
        {"id": [f"sku {n}" for n in range(60)], "title": [f"<script>alert({n})</script> & " for n in range(60)]}
    )
    table.write_csv(tmp_path / "items.csv")
    flags = ["--items", str(tmp_path / "items.csv"), "--item-column", "id", "--name-column", "title"]
    page = made(home, tmp_path / "report.html", *flags)
    assert "<script" not in page.html and "&lt;script&gt;alert(7)&lt;/script&gt; &amp;  (sku 7)" in page.html


def test_each_example_has_its_attention(home: Path, tmp_path: Path) -> None:
    """Layer by layer the colours of the weights that the attention command writes; none of a backbone without."""
    opened = open_trained(home / "a", "best", [*WHOLE_LAYERS], Mesh.of_process())
    split = opened.assembly.loaders["test"].split
    rows = np.array([3, 8])
    pictures = attention_pictures(opened, split, rows, longest=100)
    users = opened.dataset.vocabulary(opened.dataset.schema.user.name)[split.users[rows]]
    spec = RequestSpec(split="test", users=pl.DataFrame({"who": users.tolist()}))
    write_attention(opened, spec, tmp_path / "attention", 2)
    tensors = load_file(tmp_path / "attention" / "attention.safetensors")
    for number, picture in enumerate(pictures):
        assert (tensors[f"{number}/layer0"] < 0).any(), "weights of HSTU have a sign"
        means = [tensors[f"{number}/layer{layer}"].mean(0) for layer in range(2)]
        drawn, size = matplotlib.image.imread(io.BytesIO(picture)), len(means[0])
        assert size > 4 and drawn.shape == (size, 2 * size + 1, 4) and not drawn[:, size, 3].any()
        for left, mean in zip((0, size + 1), means, strict=True):
            wanted = matplotlib.colormaps["viridis"]((mean.abs() / mean.abs().max()).numpy())
            assert np.abs(drawn[:, left : left + size] - wanted).max() < 1 / 128
    assert attention_pictures(opened, split, rows, longest=3) == [None, None]
    opened.model.backbone = torch.nn.Identity()
    assert attention_pictures(opened, split, rows, longest=100) == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["", "ContextParallelArgs.context_parallel_size=2"])
def test_ranks_make_it_together_at_the_end(tmp_path: Path, split: str) -> None:
    """Two ranks write what one process writes of their run afterwards."""
    write_tiny(tmp_path / "tmp_data" / "synthetic")
    lines = (*BINDINGS["retrieval"], "TrainerArgs.report=True", "TrainerArgs.max_train_iters=4")
    flags = ["--gin-config-file=custom_retrieval.gin"]
    flags += [f"--gin-bindings={line}" for line in (*lines, *filter(None, [split]))]
    command = torchrun_command(2, ROOT / "examples" / "pretrain_gr_retrieval.py", *flags, "--run-dir", "run")
    done = launched(command, cwd=tmp_path)
    assert done.code == 0 and done.out.count("report: ") == 1, done.err
    assert report.main([str(tmp_path / "run"), "--output", str(tmp_path / "one.html")]) == 0
    both = [re.sub(r">\d\.\d{3}<|data:image/png[^\"]*", "", path.read_text())  # scores of items differ by rounding
            for path in (tmp_path / "run" / "report.html", tmp_path / "one.html")]  # fmt: skip
    assert both[0] == both[1] and "user " in both[0]


def test_of_several_ranks_what_befalls_one_alone_ends_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the others would wait for it."""

    def fail(error: BaseException) -> None:
        raise error

    mesh = Mesh.of_process()
    several = SimpleNamespace(world_size=2, on_main=mesh.on_main)
    for error in (MemoryError("out of memory"), Stopped(2)):
        monkeypatch.setattr(write, "write_report", lambda *_, error=error: fail(error))
        with pytest.raises(type(error)):
            write.report_at_end(home / "a", several)
    monkeypatch.setattr(write, "write_report", lambda *_: fail(ValueError("all ranks know")))
    write.report_at_end(home / "a", several)


def test_attention_pictures_are_inside(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "a", tmp_path / "a", symlinks=True)
    matplotlib.image.imsave(tmp_path / "a" / "figures" / "attention_layer0.png", np.eye(4))
    assert report.main([str(tmp_path / "a"), "--output", str(tmp_path / "r.html")]) == 0
    page = Page(tmp_path / "r.html")
    assert "attention" in page.ids and sum(link.startswith("data:image/png;base64,") for link in page.links) == 11


def test_mistakes_are_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "a", tmp_path / "a", symlinks=True)
    shutil.copytree(home / "a", tmp_path / "damaged", symlinks=True)
    (tmp_path / "damaged" / "eval.json").write_text("{")
    (tmp_path / "file").write_text("")
    run = str(home / "a")
    for words, flags in (
        ("holds no run", [str(home)]),
        ("two runs are called 'a'", [run, str(tmp_path / "a")]),
        ("eval.json: is damaged", [str(tmp_path / "damaged")]),
        ("give all three", [run, "--items", "x.csv"]),
        ("cannot be written", [run, "--output", str(tmp_path / "file" / "r.html")]),
    ):
        output = [] if "--output" in flags else ["--output", str(tmp_path / "r.html")]
        assert report.main([*flags, *output]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "r.html").exists()


def test_a_run_that_was_not_tested_yet(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "a", tmp_path / "a", symlinks=True)
    (tmp_path / "a" / "eval.json").unlink()
    assert report.main([str(tmp_path / "a"), "--output", str(tmp_path / "r.html")]) == 0
    page = Page(tmp_path / "r.html")
    assert "not tested yet" in page.text and "no eval.json yet" in page.text and "examples" not in page.ids


PROBE = """<script>window.onload = () => {
  const seen = document.querySelectorAll.bind(document), rgb = getComputedStyle(document.body).backgroundColor;
  const wide = document.documentElement.scrollWidth - innerWidth;
  seen('details').forEach(e => { e.open = true; });
  const all = [...seen('a, summary, [tabindex]')];
  const focusable = all.filter(e => { e.focus(); return document.activeElement === e; });
  document.title = JSON.stringify({wide: wide, page: rgb, charts: seen('svg').length, tables: seen('table').length,
    focusable: focusable.length, all: all.length});
};</script>"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_a_browser_shows_it(home: Path, tmp_path: Path, width: int, dark: bool) -> None:
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    browser = next((path for path in found if path), None)
    if browser is None:
        pytest.skip("no Chromium here")
    page = made(home, tmp_path / "report.html")
    (tmp_path / "probed.html").write_text(page.html.replace("</body>", f"{PROBE}</body>"))
    flags = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]

    def browse(*more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*flags, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
        return done

    dom = browse("--dump-dom", (tmp_path / "probed.html").as_uri()).stdout
    probe = json.loads(re.search(r"<title>(\{.*?\})</title>", dom).group(1))  # type: ignore[union-attr]
    assert probe["page"] == ("rgb(18, 22, 29)" if dark else "rgb(255, 255, 255)")
    assert probe["wide"] <= 0, "the page itself does not scroll sideways"
    assert probe["charts"] >= 6 and probe["tables"] >= 3 and probe["focusable"] == probe["all"] > 15
    browse(f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "report.html").as_uri())
    picture = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert picture.shape[1] >= width
    # The colours of the first two runs are on it.
    colors = [(0x7A, 0xA7, 0xFF), (0xFF, 0x9A, 0x62)] if dark else [(0x25, 0x63, 0xEB), (0xD9, 0x48, 0x0F)]
    for color in colors:
        assert (np.abs(picture * 255 - color).max(-1) < 2).sum() > 50
