"""Runs to a page: what is looked at, what is left out and why."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

from hstu.config import read_settings
from hstu.data.overview import Overview, overview
from hstu.data.reader import SequenceDataset
from hstu.inference.opened import open_trained
from hstu.inference.report.facts import Example, examples, read_facts
from hstu.inference.report.page import make_page
from hstu.inference.run import Run
from hstu.interrupt import Stopped
from hstu.parallel import Mesh
from hstu.quiet import warn_only
from hstu.training.checkpoint_files import write_atomically

logger = logging.getLogger(__name__)

MOST_EVENTS = 50_000_000  # of a data set that is read for its overview
EXAMPLES, ANSWERS = 10, 10


def write_report(
    runs: Sequence[str | Path], output: str | Path, mesh: Mesh, *, names: dict[str, str] | None = None
) -> None:
    """Write a page about ``runs`` to the file ``output``; on one rank.

    Args:
        runs: Run directories.
        output: An HTML file; its directory is created if absent.
        mesh: The ranks.
        names: Item -> what it is called.

    Raises:
        ValueError: for a directory without a run, two of one name, a data set that is gone, or a file that cannot be
            written.
    """
    if mesh.world_size > 1:
        raise ValueError(f"a report is made by one process, not {mesh.world_size}: start it without torchrun")
    facts = [read_facts(Path(run)) for run in runs]
    labels = [run.name for run in facts]
    if twice := next((name for name in labels if labels.count(name) > 1), None):
        raise ValueError(f"two runs are called {twice!r}; give directories of different names")
    data: dict[str, Overview] = {}
    found: dict[str, list[Example]] = {}
    notes: list[str] = []
    for run in facts:
        if not run.test:
            notes.append(f"{run.name}: has no eval.json yet, so that there are no example users.")
            continue
        opened = open_trained(run.path, "best" if (run.path / "checkpoints" / "best").exists() else "latest", [], mesh)
        found[run.name] = examples(Run(opened), EXAMPLES, ANSWERS)
        _look_at(opened.dataset, data, notes)
    page = make_page(facts, data, found, names or {}, notes)
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(output), page)
    except OSError as error:
        raise ValueError(f"--output = {str(output)!r}: cannot be written ({error.strerror or error})") from None


def report_at_end(run: Path, mesh: Mesh) -> None:
    """Write ``report.html`` into a run directory whose training has ended, if ``TrainerArgs.report`` is set."""
    settings = run / "operative.gin"
    if not settings.is_file() or read_settings(settings).get("TrainerArgs.report") != "True":
        return
    if mesh.world_size > 1:
        logger.info("for a page about the run: python -m hstu.cli.report %s --output report.html", run)
        return
    gc.collect()  # the trained model makes room for the one that is asked
    try:
        with warn_only(f"{run / 'report.html'} was not written"):
            write_report([run], run / "report.html", mesh)
            logger.info("report: %s", run / "report.html")
    except Stopped:  # by who does not want to wait for it: the run itself has ended
        logger.warning("interrupted: %s was not written", run / "report.html")


def _look_at(dataset: SequenceDataset, data: dict[str, Overview], notes: list[str]) -> None:
    name = dataset.schema.name
    if name in data:
        return
    if dataset.num_events > MOST_EVENTS:
        notes.append(f"{name}: {dataset.num_events:,} events are not read for a page; python -m hstu.cli.inspect does.")
    else:
        data[name] = overview(dataset)
