"""The code of the documents runs where a reader would type it, and names flags and fields that there are."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import hstu.config
from hstu.config import load_config
from tests.launch import ROOT, forked, run

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Those that are run with the quick tests.
QUICK = ("docs/extending.md",)
#: The first line of a block that is not run, and why.
NOT_RUN = {
    "README.md: make demo": "minutes; test_figures trains the same models",
    "CONTRIBUTING.md: make venv": "the environment and the tests themselves",
    "docs/first_hour.md: pip install": "needs a network; test_package installs a wheel",
    "docs/first_hour.md: python -m hstu.cli.env": "as in docs/install.md",
    "docs/install.md: python -m hstu.cli.env": "exit code 1 where versions are newer than pinned; test_environment",
    "docs/install.md: git clone": "needs a network",
    "docs/install.md: pip install": "needs a network; test_package installs a wheel",
    "docs/install.md: pip wheel": "in a clone alone; test_package builds the wheel",
    "docs/item_text.md: python preprocessing/preprocessor.py": "the log is not here; test_item_text has a planted one",
    "docs/item_text.md: from transformers": "downloads; test_item_text writes a model of random weights",
    "docs/install.md: python3.11 -m venv": "needs a network and a GPU",
    "docs/install.md: grep -E": "needs a network",
    "docs/install.md: python3.12 -m venv": "needs Python 3.12 and what the block above it downloads",
    "docs/serving.md: pip install": "needs a network; test_package installs a wheel",
    "docs/serving.md: python -m hstu.cli.serve": "a server does not end; tests/serving starts it",
    "docs/serving.md: curl": "asks that server",
    "docs/results.md: python preprocessing/preprocessor.py --dataset_name synthetic": "downloads; half an hour",
    "docs/results.md: python preprocessing/preprocessor.py --dataset_name ml-100k": "downloads; minutes",
    "docs/results.md: python preprocessing/preprocessor.py --dataset_name custom": "the log is not here",
}
#: Flags of other programs that documents name.
FOREIGN = {
    *("--help", "--version", "--nproc_per_node", "--max-restarts", "--master_port", "--standalone", "--no-deps"),
    *("--no-index", "--find-links", "--no-build-isolation", "--only-binary", "--python-version", "--platform"),
    *("--dest", "--sdist", "--system-site-packages"),
}


@dataclass(frozen=True)
class Block:
    """Code of a document."""

    document: str
    language: str
    code: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return next((why for key, why in NOT_RUN.items() if f"{self.document}: {self.code}".startswith(key)), None)

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(path: Path) -> list[Block]:
    name = str(path.relative_to(ROOT))
    return [Block(name, language, re.sub(rf"^{indent}", "", code, flags=re.M))
            for indent, language, code in FENCE.findall(path.read_text())]  # fmt: skip


ALL = [block for path in DOCUMENTS for block in blocks_of(path)]
RUN = [path for path in DOCUMENTS if any(b.language in ("bash", "python") and not b.reason for b in blocks_of(path))]


def in_time(path: Path) -> object:
    name = str(path.relative_to(ROOT))
    return pytest.param(path, id=name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("path", [in_time(path) for path in RUN])
def test_the_code_of_a_document_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its order, in a directory that holds what a clone does."""
    for name in ("preprocessing", "examples", "configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(path):
        if block.reason is None and block.language == "python":
            exec(compile(block.code, str(path), "exec"), names)  # noqa: S102
        elif block.reason is None and block.language == "bash":
            for program, *words in block.commands:
                if program == "python":
                    done = forked(*words[words[0] == "-m" :], cwd=tmp_path)
                else:
                    done = run([str(Path(sys.executable).with_name(program)), *words], cwd=tmp_path)
                assert done.code == 0, f"{shlex.join([program, *words])}: {done.out[-2000:]}\n{done.err[-3000:]}"


def test_every_block_is_run_or_has_a_reason() -> None:
    assert {block.language for block in ALL} <= {"bash", "python", "gin", "text"}, "a fence names its language"
    keys = {key for key in NOT_RUN if any(f"{b.document}: {b.code}".startswith(key) for b in ALL)}
    assert keys == set(NOT_RUN), "reasons of blocks that are no longer there"
    assert set(QUICK) <= {str(path.relative_to(ROOT)) for path in RUN}


@functools.cache
def flags_of(script: str) -> frozenset[str]:
    """The flags that a command's help names, spelled with underscores."""
    done = forked(script, "--help", cwd=ROOT)
    return frozenset(name.replace("-", "_") for name in re.findall(r"--(?:\[no\])?([a-z][\w-]*)", done.out + done.err))


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The script or module of ours that a command runs, and what it is given; None for other programs."""
    for place, word in enumerate(words):
        if re.fullmatch(r"hstu\.cli\.\w+|(examples|preprocessing|benchmarks)/\w+\.py", word):
            return word, words[place + 1 :]
    return None


def test_commands_name_flags_and_fields_that_there_are() -> None:
    for block in (block for block in ALL if block.language == "bash"):
        checked = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
        assert checked.returncode == 0, f"{block.document}: {checked.stderr}"
        for command in block.commands:
            if (found := script_of(command)) is None:
                continue
            script, words = found
            given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
            assert given <= flags_of(script), f"{block.document}: {shlex.join(command)}"
            if "gin_config_file" in given and "/pretrain" in script:
                values = dict(zip(words, words[1:], strict=False))
                bindings = [value for word, value in zip(words, words[1:], strict=False) if word == "--gin-bindings"]
                task = "ranking" if "ranking" in script else "retrieval"
                load_config(task, [values["--gin-config-file"]], bindings)


def test_settings_are_ones_that_there_are() -> None:
    for block in (block for block in ALL if block.language == "gin"):
        task = "ranking" if "RankingArgs" in block.code else "retrieval"
        load_config(task, [f"custom_{task}.gin"], [line for line in block.code.splitlines() if line.strip()])
    for block in (block for block in ALL if block.language == "python"):
        compile(block.code, block.document, "exec")


def test_prose_names_flags_fields_and_scripts_that_there_are() -> None:
    ours = ("examples/pretrain_gr_ranking.py", "preprocessing/preprocessor.py")
    commands = sorted(p.stem for p in (ROOT / "hstu/cli").glob("*.py") if "def main(argv" in p.read_text())
    known = frozenset().union(*map(flags_of, (*ours, *(f"hstu.cli.{name}" for name in commands))))
    for path in DOCUMENTS:
        prose = FENCE.sub("", path.read_text())
        for owner, name in re.findall(r"\b([A-Z]\w+Args)\.(\w+)", prose):
            known_fields = {field.name for field in fields(getattr(hstu.config, owner))}
            assert name in known_fields, f"{path.name}: {owner}.{name}"
        for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose):
            scripts = re.findall(r"python\s((?:\w+/)+\w+\.py)", code)
            for script in scripts:
                assert (ROOT / script).is_file(), f"{path.name}: {script}"
            for flag in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", code):
                named = known.union(*map(flags_of, scripts))
                assert flag in FOREIGN or flag[2:].replace("-", "_") in named, f"{path.name}: {flag}"
            for module in re.findall(r"\bhstu\.cli\.(\w+)", code):
                assert (ROOT / "hstu/cli" / f"{module}.py").is_file(), f"{path.name}: {module}"
