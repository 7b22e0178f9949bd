"""Ctrl-C and SIGTERM end a process soon whatever it does, and wait only for a save."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from hstu.interrupt import Stopped, StopRequest, patience, requested
from tests.launch import ENVIRONMENT

START = """
import hashlib, os, signal, threading, time
from hstu import interrupt
from hstu.interrupt import StopRequest, patience

def stuck():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # an hour inside a library, which asks for no signal

def send(*numbers, pause=0.1):
    def sender():
        for number in numbers:
            time.sleep(pause)
            os.kill(os.getpid(), number)
    threading.Thread(target=sender, daemon=True).start()

"""


def outcome(script: str) -> tuple[int, str]:
    """Return exit code and standard error of a process."""
    command = [sys.executable, "-c", START + script]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_raises_or_is_noted(number: int) -> None:
    with StopRequest(), pytest.raises(Stopped) as caught:
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number
    with StopRequest(), patience(lambda: "", lambda: False):
        assert requested() is None
        signal.raise_signal(number)
        assert requested() == number
    assert requested() is None


def test_an_echo_after_patience_raises_nothing() -> None:
    """The first was obeyed; raised once more, on the way out, the process would end with code 1."""
    with StopRequest():
        with patience(lambda: "", lambda: False):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert requested() == signal.SIGTERM


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_stuck_ends_after_the_grace(number: int) -> None:
    script = f"send({int(number)})\nwith StopRequest(lambda: 'the words', grace=0.3): stuck()"
    assert outcome(script) == (128 + number, "the words\n")


def test_a_second_signal_ends_a_stuck_process_at_once() -> None:
    assert outcome("send(2, 2)\nwith StopRequest(grace=1000): stuck()") == (130, "interrupted\n")
    script = "interrupt._ECHO = 0.05\nsend(15, 15)\nwith StopRequest(grace=1000), patience(str, bool): stuck()"
    assert outcome(script) == (143, "interrupted\n")


def test_a_sigterm_that_comes_twice_at_once_is_one() -> None:
    """Slurm sends it to every process, and torchrun to its ranks."""
    script = "send(15, 15, pause=0.01)\nwith StopRequest(lambda: 'words', grace=1.5): stuck()"
    assert outcome("interrupt._ECHO = 60\n" + script) == (143, "words\n")


def test_a_save_is_waited_for() -> None:
    script = """
saved = threading.Event()
threading.Timer(1.5, saved.set).start()
send(15)
with StopRequest(grace=0.2), patience(lambda: f"saved {saved.is_set()}", lambda: not saved.is_set()): stuck()
"""
    assert outcome(script) == (143, "saved True\n")


def test_imports_are_left_in_one_word() -> None:
    assert outcome("import hstu.cli\nraise KeyboardInterrupt") == (-signal.SIGINT, "interrupted\n")
    importing = """
import builtins
from hstu.cli.command import run_on_mesh
original = builtins.__import__

def slow(name, *rest):
    if name == "hstu.parallel":
        send(15)
        stuck()
    return original(name, *rest)

builtins.__import__ = slow
run_on_mesh(None)
"""
    assert outcome(importing) == (143, "interrupted\n")
