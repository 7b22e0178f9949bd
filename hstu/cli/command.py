"""What commands share: the ranks joined, and errors in one line."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from hstu.interrupt import GRACE, Stopped, StopRequest

if TYPE_CHECKING:
    from hstu.parallel import Mesh

logger = logging.getLogger("hstu.cli")


def run_on_mesh(action: Callable[[Mesh], None], unfinished: str = "") -> int:
    """Join the ranks and run ``action``.

    Args:
        action: What every rank does.
        unfinished: What to say of it when a signal ends it.

    Returns:
        The exit code: 2 for a user's mistake, in one line; 130 and 143 for Ctrl-C and SIGTERM.
    """
    with StopRequest(
        lambda: f"interrupted{unfinished}", grace=0.0
    ) as stop:  # while imports and other ranks are awaited
        from hstu.parallel import Mesh

        with Mesh.create() as mesh:
            stop.grace = GRACE
            code = _run(action, mesh, unfinished)
            stop.patient = True  # what is left is to part
            return code


def _run(action: Callable[[Mesh], None], mesh: Mesh, unfinished: str) -> int:
    from hstu.parallel.mistakes import is_first_to_tell, is_told
    from hstu.training.file_errors import describe, is_foreseeable
    from hstu.training.meter import TrainingError
    from hstu.training.run_directory import configure_logging

    try:
        configure_logging(None, is_main=mesh.is_main)
        action(mesh)
    except Stopped as stopped:
        if mesh.is_main and not stopped.told:
            print(f"interrupted{unfinished}", file=sys.stderr)
        return stopped.exit_code
    except (ValueError, TrainingError) as error:
        logger.debug("traceback", exc_info=True)
        if is_first_to_tell(str(error)):  # what all ranks find is printed once
            print(f"error{'' if mesh.is_main else f' on rank {mesh.rank}'}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if is_told():
            logger.debug("traceback, after another rank's mistake", exc_info=True)
            return 1
        if isinstance(error, OSError) and is_foreseeable(error):
            print(f"error: {describe(error)}", file=sys.stderr)
            return 2
        print(f"rank {mesh.rank} of {mesh.world_size} failed:\n{traceback.format_exc()}", file=sys.stderr, end="")
        return 1
    return 0
