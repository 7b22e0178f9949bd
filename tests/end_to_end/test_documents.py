"""The Python of the documents runs where a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch import ROOT

# A python block with this comment on the line above it is run; those of one document share their names.
BLOCK = re.compile(r"^<!-- test -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [path for path in sorted((ROOT / "docs").glob("*.md")) if BLOCK.search(path.read_text())]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_the_python_of_a_document_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for code in BLOCK.findall(document.read_text()):
        exec(compile(code, str(document), "exec"), names)  # noqa: S102


def test_some_documents_are_run() -> None:
    assert {path.stem for path in DOCUMENTS} >= {"python"}
