"""The notebook of the examples: what it names is there, its outputs are those of a run, and it runs."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import hstu
from tests.launch import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def code_cells(text: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def kinds_of(cell: dict[str, Any]) -> list[list[str]]:
    """What a cell gives: kinds of data of each output, or the name of a stream."""
    return [sorted(output["data"]) if "data" in output else [output.get("name", "error")] for output in cell["outputs"]]


def defined(path: str, name: str) -> Any:
    """A class or function in a module of the package, which takes seconds to import."""
    body = ast.parse((ROOT / "hstu" / path).read_text()).body
    return next(node for node in body if getattr(node, "name", None) == name)


def test_the_stored_notebook_is_whole_and_names_what_there_is() -> None:
    text = NOTEBOOK.read_text()
    cells, calls = code_cells(text), set[str]()
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], "run from the first cell on"
    kinds = [kind for cell in cells for output in kinds_of(cell) for kind in output]
    assert kinds.count("image/png") >= 3 and not {"error", "stderr", "stdout"} & {*kinds}
    assert len(text) < 200_000 and not re.search(r"/(home|root|tmp|work)/", text), "small, and of no machine"
    known = {
        "hstu": {*hstu.__all__},
        "run": {getattr(node, "name", "") for node in defined("inference/run.py", "Run").body},
    }
    code = "\n".join(re.sub(r"^%.*$", "", "".join(cell["source"]), flags=re.M) for cell in cells)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert node.attr in known[node.value.id], node.attr
            calls.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hstu.fit":
            given = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
            assert given.keys() <= {word.arg for word in defined("api.py", "fit").args.kwonlyargs}
            assert (ROOT / "configs" / given["config"]).is_file()
    assert {"fit", "open_run", "recommend", "evaluate", "similar_items", "baselines"} <= calls


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel, beside its log; what the cells give is of the kinds that are stored, and the score as good."""
    reason = "pip install -r requirements/dev.txt"
    nbclient, nbformat, _ = (pytest.importorskip(n, reason=reason) for n in ("nbclient", "nbformat", "ipykernel"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # of the tests; pictures are those of a notebook
    shutil.copy(NOTEBOOK.with_name("shop.csv"), tmp_path)
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    stored, place = code_cells(NOTEBOOK.read_text()), {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=place).execute()
    assert [kinds_of(cell) for cell in code_cells(nbformat.writes(book))] == [kinds_of(cell) for cell in stored]
    run = tmp_path / "runs" / "quickstart"
    record, simple = (json.loads((run / name).read_text()) for name in ("eval.json", "baselines.json"))
    # 0.66 measured, with a standard error of 0.03 over users; 0.29 of popularity, which has no seed.
    assert record["metrics"]["HR@10"] > 0.54 > simple["baselines"]["popularity"]["HR@10"] + 4 * 0.03
    assert (run / "report.html").is_file()
