"""Runs to a page: what is looked at, what is left out and why."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

from hstu.config import read_settings
from hstu.data.item_text import item_names
from hstu.data.overview import Overview, overview
from hstu.data.reader import SequenceDataset
from hstu.inference.attention import WHOLE_LAYERS
from hstu.inference.opened import open_trained
from hstu.inference.report.facts import Example, Facts, examples, read_facts
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
    """Write a page about ``runs`` to the file ``output``; all ranks call it, for all of them ask the models.

    Args:
        runs: Run directories.
        output: An HTML file; its directory is created if absent.
        mesh: The ranks.
        names: Item -> what it is called; None: as the data set of each run says, in a text, name or title of its items.

    Raises:
        ValueError: for a directory without a run, two of one name, a data set that is gone, or a file that cannot be
            written.
    """
    facts: list[Facts] = mesh.on_main(lambda: [read_facts(Path(run)) for run in runs])
    labels = [run.name for run in facts]
    if twice := next((name for name in labels if labels.count(name) > 1), None):
        raise ValueError(f"two runs are called {twice!r}; give directories of different names")
    found: dict[str, list[Example]] = {}
    called: dict[str, dict[str, str]] = {}
    datasets: dict[str, SequenceDataset] = {}
    notes: list[str] = []
    for run in facts:
        if not run.test:
            notes.append(f"{run.name}: has no eval.json yet, so that there are no example users.")
            continue
        has_best = mesh.on_main((run.path / "checkpoints" / "best").exists)
        opened = open_trained(run.path, "best" if has_best else "latest", [*WHOLE_LAYERS], mesh)
        found[run.name] = examples(Run(opened), EXAMPLES, ANSWERS)
        called[run.name] = item_names(opened.dataset) if names is None else names
        datasets.setdefault(opened.dataset.schema.name, opened.dataset)

    def write() -> None:
        data = _overviews(datasets, notes)
        page = make_page(facts, data, found, called, notes)
        try:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(output), page)
        except OSError as error:
            raise ValueError(f"--output = {str(output)!r}: cannot be written ({error.strerror or error})") from None

    mesh.on_main(write)


def report_at_end(run: Path, mesh: Mesh) -> None:
    """Write ``report.html`` into a run directory whose training has ended, if ``TrainerArgs.report`` is set.

    What goes wrong is a warning, for the run itself has ended; all ranks call it.

    Raises:
        Stopped: of several ranks, which cannot go on together after it.
        Exception: likewise, what may have happened to this rank alone: the launcher then ends those that wait for it.
    """
    settings = run / "operative.gin"
    if not mesh.on_main(lambda: settings.is_file() and read_settings(settings).get("TrainerArgs.report") == "True"):
        return
    gc.collect()  # the trained model makes room for the one that is asked
    several = mesh.world_size > 1
    try:
        with warn_only(f"{run / 'report.html'} was not written", ValueError if several else Exception):
            write_report([run], run / "report.html", mesh)
            logger.info("report: %s", run / "report.html")
    except Stopped as stopped:  # by who does not want to wait for it
        logger.warning("interrupted: %s was not written", run / "report.html")
        if several:
            stopped.told = True
            raise


def _overviews(datasets: dict[str, SequenceDataset], notes: list[str]) -> dict[str, Overview]:
    """Return what data sets are like, and add to ``notes`` which are not looked at."""
    small = {name: dataset for name, dataset in datasets.items() if dataset.num_events <= MOST_EVENTS}
    for name in datasets.keys() - small.keys():
        events = datasets[name].num_events
        notes.append(f"{name}: {events:,} events are not read for a page; python -m hstu.cli.inspect does.")
    return {name: overview(dataset) for name, dataset in small.items()}
