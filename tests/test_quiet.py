"""Known notices are silent; everything else still speaks."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from hstu import bar
from hstu.quiet import silence_known_notices

IMPORTS = """
import fbgemm_gpu
import torchrec
import torchrec.distributed.train_pipeline
import megatron.core.distributed
import megatron.core.optimizer
import megatron.core.optimizer_param_scheduler
import megatron.core.parallel_state
import megatron.core.tensor_parallel
import torch.distributed.checkpoint
from megatron.core.transformer import TransformerConfig
from torchrec.distributed.planner import Topology

Topology(world_size=2, compute_device="cpu")
TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, use_cpu_initialization=True)
"""
SILENCE = "from hstu.quiet import silence_known_notices; silence_known_notices()\n"


def output(code: str) -> str:
    """What a fresh interpreter prints, on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_importing_the_libraries_is_silent_after_the_call():
    pytest.importorskip("torchrec")
    pytest.importorskip("megatron.core")
    loudest = "from megatron.core.transformer import TransformerConfig"
    assert loudest in IMPORTS and "Transformer Engine" in output(loudest), "without the call the libraries do speak"
    assert output(SILENCE + IMPORTS) == ""


def test_other_warnings_and_records_pass(caplog):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence_known_notices()
        warnings.warn("full scope is deprecated. Use empty cuda_graph_scope to capture", UserWarning, stacklevel=1)
        warnings.warn("full scope is deprecated. Use empty cuda_graph_scope", DeprecationWarning, stacklevel=1)
        warnings.warn("the table is not sharded", UserWarning, stacklevel=1)
    assert [(w.category, str(w.message)[:9]) for w in seen] == [
        (DeprecationWarning, "full scop"),
        (UserWarning, "the table"),
    ]
    planner = logging.getLogger("torchrec.distributed.planner.types")
    planner.warning("The topology was constructed directly rather than by a factory")
    planner.warning("HardwareConfig validation: no bandwidth")
    logging.warning("\n    \033[33m\n    _fbgemm_torch_compat_table has no entry for 1.6.0 of FBGEMM")
    logging.warning("\n    \033[33m\n    _fbgemm_torch_compat_table has no entry for 1.9.0 of FBGEMM")
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "HardwareConfig validation: no bandwidth"
    assert "1.9.0" in messages[1] and len(messages) == 2


def test_calling_twice_adds_nothing():
    silence_known_notices()
    before = len(logging.getLogger("torch.fx._symbolic_trace").filters), len(warnings.filters)
    silence_known_notices()
    assert (len(logging.getLogger("torch.fx._symbolic_trace").filters), len(warnings.filters)) == before


@pytest.fixture(scope="module")
def a_command() -> None:
    """What a run does to the log, in a fixture that stands before those of a test."""
    log = logging.getLogger("hstu")
    log.handlers, log.propagate = [logging.NullHandler()], False
    log.setLevel(logging.ERROR)


def test_no_test_meets_the_log_of_another_one_or_of_a_fixture(
    a_command: None, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("hstu.quiet")
    with caplog.at_level(logging.INFO):
        log.info("heard")
    assert caplog.messages == ["heard"] and logging.getLogger("hstu").handlers == []


def test_bars_are_for_who_looks_and_wants_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal or a notebook, there without its widgets too; none where warnings alone are shown."""
    assert bar.progress_bar(total=3) is None, "the tests have no terminal"
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger("hstu"), "handlers", [handler])
    for where in ((sys.stdout, "isatty"), (bar, "in_notebook")):
        with monkeypatch.context() as patched, warnings.catch_warnings(action="error"):
            patched.setattr(*where, lambda: True)
            patched.setattr(bar, "find_spec", lambda name: None)
            for level, shown in ((logging.INFO, True), (logging.WARNING, False)):
                handler.setLevel(level)
                made = bar.progress_bar(total=3, disable=True)
                assert (made is not None) == shown
