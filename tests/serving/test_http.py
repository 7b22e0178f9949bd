"""What a server refuses, and that nothing that clients or checkpoints do keeps it from answering."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu.cli import serve as command
from hstu.serving.app import make_app
from hstu.serving.batching import Batches, OverloadedError, StoppingError
from hstu.serving.pages import try_page
from hstu.serving.questions import Limits
from hstu.serving.server import Server, listen
from hstu.serving.service import Service
from tests.launch import ROOT
from tests.serving.client import Reply, get, post, post_all, send
from tests.serving.conftest import history_of, later_events, serve
from tests.serving.test_answers import items_of

USER = {"user": "u-07", "k": 3}


def refusal(reply: Reply, status: int = 400) -> str:
    assert reply.status == status, (reply.status, reply.body)
    assert list(reply.told) == ["error"] and "\n" not in reply.told["error"] and len(reply.told["error"]) < 500
    return reply.told["error"]


def test_bad_input_is_refused_in_one_line(app: Any) -> None:
    events, features = history_of("u-07")
    later = later_events("u-07", 1)[0]
    for words, body in (
        ("user: 'nobody' is not in the data set", {"user": "nobody"}),
        ("user, history: give one of them", {}),
        ("user, history: give one of them", {"user": "u-07", "history": events}),
        ("events: go on from", {"history": events, "features": features, "events": events}),
        ("features: are those of the data set", {"user": "u-07", "features": features}),
        ("history: column 'when' is missing", {"history": ["sku 7"], "features": features}),
        ("history: column 'age' is missing", {"history": events}),
        ("'sku x'", {"history": [dict(events[0], what="sku x")], "features": features}),
        ("history: the values of 'when' are of several types",
         {"history": [events[0], dict(events[0], when="now")], "features": features}),
        ("lies before the last one", {"user": "u-07", "events": [dict(later, when=1)]}),
        ("events: column 'when'", {"user": "u-07", "events": [dict(later, when="yesterday")]}),
        ("'no': is no time", {"user": "u-07", "request_time": "no"}),
        ("request_time = 5: lies before the last event", {"user": "u-07", "request_time": 5}),
        ("candidates: 'sku x' is not in the catalogue", {"user": "u-07", "candidates": ["sku 1", "sku x"]}),
        ("k: 1,001 where this server takes at most 1,000", {"user": "u-07", "k": 1001}),
        ("k: ", {"user": "u-07", "k": 0}),
        ("k: ", {"user": "u-07", "k": True}),
        ("filter_seen: ", {"user": "u-07", "filter_seen": "yes"}),
        ("'usr': there is no such field", {"usr": "u-07"}),
        ("surrogate", {"user": "\ud800"}),
        ("the body is no JSON", b'{"user": "u'),
        ("body: ", b"[]"),
    ):  # fmt: skip
        assert words in refusal(post(app, "/recommend", body)), body
    assert "not in the catalogue" in refusal(post(app, "/score", {"user": "u-07", "candidates": ["sku x"],
                                                                  "missing_features": "allow"}))  # fmt: skip
    assert "not in the catalogue" in refusal(post(app, "/similar", {"items": ["sku x"]}))
    assert "items: " in refusal(post(app, "/similar", {"items": []}))
    refusal(post(app, "/nothing", {}), 404)
    refusal(get(app, "/recommend"), 405)
    assert "65,536 bytes" in refusal(post(app, "/recommend", b" " * 70_000), 413)
    assert post(app, "/recommend", USER).status == 200


def test_limits_are_those_of_the_server(place: Path) -> None:
    service = serve(place / "retrieval", model={"limits": Limits(k=5, events=2, items=3)})
    app, (events, features) = make_app(service), history_of("u-07")
    for words, route, body in (
        ("k: 6 where", "/recommend", {"user": "u-07", "k": 6}),
        ("history: 3 events where", "/recommend", {"history": events[:3], "features": features, "k": 1}),
        ("candidates: 4 where", "/recommend", {"user": "u-07", "candidates": ["sku 1"] * 4, "k": 1}),
        ("candidates: 4 where", "/score", {"user": "u-07", "candidates": ["sku 1"] * 4}),
        ("k: 4 neighbours", "/similar", {"items": ["sku 1", "sku 2"], "k": 2}),
    ):
        assert words in refusal(post(app, route, body))
    service.close()


def test_only_who_has_the_token_may_ask(service: Service) -> None:
    app = make_app(service, token="opén")
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "open"}):
        reply = post(app, "/recommend", USER, **headers)
        assert "token" in refusal(reply, 401) and reply.headers["www-authenticate"] == "Bearer"
    for path in ("/reload", "/metrics"):
        refusal(get(app, path), 401)
    assert all(get(app, path).status == 200 for path in ("/", "/docs", "/openapi.json", "/health"))
    assert post(app, "/recommend", USER, authorization="Bearer opén").status == 200


class Slow:
    """A model that answers when it is told to."""

    def __init__(self) -> None:
        self.go, self.sizes = threading.Event(), list[int]()

    def answer(self, questions: list[Any]) -> list[Any]:
        assert self.go.wait(30)
        self.sizes.append(len(questions))
        if "bad" in questions:
            raise RuntimeError("this one cannot be answered")
        return [[{"item": question}] for question in questions]


def test_batches_lose_nobody(caplog: pytest.LogCaptureFixture) -> None:
    model, other = Slow(), Slow()
    batches = Batches(size=4, wait=0.05, most=6)
    first = batches.ask(model, "first")  # type: ignore[arg-type]
    deadline = time.monotonic() + 10
    while batches.waiting and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.06)  # its batch is full with itself
    asked = ((model, "a"), (model, "bad"), (other, "b"), (model, "c"), (model, "d"), (other, "e"))
    rest = [batches.ask(model, question) for model, question in asked]  # type: ignore[arg-type]
    with pytest.raises(OverloadedError):
        batches.ask(model, "too many")  # type: ignore[arg-type]
    rest[3].cancel()  # a client that went away
    model.go.set()
    other.go.set()
    batches.close()
    assert first.result(1) == [{"item": "first"}] and rest[3].cancelled()
    for future, name in zip(rest, ("a", "bad", "b", None, "d", "e"), strict=True):
        if name == "bad":
            assert "was not answered" in str(future.exception(1))
        elif name is not None:
            assert future.result(1) == [{"item": name}]
    assert max(model.sizes) == 2 and "this one cannot be answered" in caplog.text
    with pytest.raises(StoppingError):
        batches.ask(model, "late")  # type: ignore[arg-type]


def test_too_many_are_told_to_come_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, go = serve(place / "retrieval", max_waiting=2, batch_size=1), threading.Event()
    app, answer = make_app(service), service.model.answer
    monkeypatch.setattr(service.model, "answer", lambda asked: go.wait(30) and answer(asked))
    threading.Timer(0.3, go.set).start()
    replies = post_all(app, "/recommend", [USER] * 8)
    found = sorted(reply.status for reply in replies)
    assert found[:2] == [200, 200] and set(found) == {200, 429} and found.count(429) >= 5
    late = next(reply for reply in replies if reply.status == 429)
    assert late.headers["retry-after"] == "1" and "2 questions wait" in late.told["error"]
    service.close()
    assert post(app, "/recommend", USER).status == 503


@pytest.fixture
def moving(place: Path, tmp_path: Path) -> Iterator[tuple[Path, Service]]:
    """A run of its own whose best checkpoint is that of step 2, and what serves it."""
    run = tmp_path / "retrieval"
    shutil.copytree(place / "retrieval", run, symlinks=True)
    point(run, "step_000000002")
    service = serve(run)
    yield run, service
    service.close()


def point(run: Path, step: str) -> None:
    best = run / "checkpoints" / "best"
    best.with_name("new").symlink_to(step)
    os.replace(best.with_name("new"), best)


def damage(run: Path, step: str) -> None:
    (file, *_) = sorted((run / "checkpoints" / step).glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


def test_a_new_checkpoint_takes_over_and_a_damaged_one_does_not(moving: tuple[Path, Service]) -> None:
    run, service = moving
    app = make_app(service)
    assert post(app, "/recommend", USER).told["step"] == 2
    point(run, "step_000000004")

    async def ask_on() -> list[Reply]:
        reload = asyncio.create_task(send(app, "POST", "/reload"))
        replies = []
        while not reload.done():
            replies.append(await send(app, "POST", "/recommend", json.dumps(USER).encode()))
        return [*replies, await reload, await send(app, "POST", "/recommend", json.dumps(USER).encode())]

    *during, reload, after = asyncio.run(ask_on())
    assert during and {reply.status for reply in (*during, reload, after)} == {200}
    assert [reply.told["step"] for reply in during] == sorted(reply.told["step"] for reply in during)
    assert during[0].told["step"] == 2 and reload.told == {"step": 4} and after.told["step"] == 4
    assert during[0].told["items"] != after.told["items"]
    damage(run, "step_000000002")
    point(run, "step_000000002")
    line = refusal(post(app, "/reload", b""))
    assert "is damaged" in line and line.endswith("step 4 is served as before")
    (run / "checkpoints" / "best").unlink()
    assert "no finished checkpoint 'best'" in refusal(post(app, "/reload", b""))
    assert post(app, "/recommend", USER).told == after.told
    text = get(app, "/metrics").body.decode()
    assert 'hstu_reloads_total{outcome="refused"} 2.0' in text and 'hstu_reloads_total{outcome="done"} 1.0' in text
    assert "hstu_checkpoint_step 4.0" in text


def test_a_server_that_watches_takes_it_up_by_itself(
    moving: tuple[Path, Service], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)
    run, first = moving
    service = serve(run, watch=0.02)
    damage(run, "step_000000004")
    point(run, "step_000000004")
    deadline = time.monotonic() + 20
    while "is not taken up" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "is damaged" in caplog.text and service.model.step == 2
    shutil.copytree(first.model.opened.checkpoint, run / "checkpoints" / "step_000000003")
    before = service.model
    point(run, "step_000000003")
    while service.model is before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert service.model is not before
    service.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("u-07") | st.just("sku 7"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("user", "events", "history", "features", "request_time", "unknown_items", "missing_features", "k",
          "filter_seen", "candidates", "items", "what", "when", "did", "price", "plan", "age")  # fmt: skip
ROWS = st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5), max_size=3)
BODIES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(FIELDS), JSON | ROWS, max_size=6).map(lambda value: json.dumps(value).encode()),
    st.tuples(st.sampled_from(FIELDS), JSON | ROWS).map(lambda p: json.dumps({"user": "u-07"} | {p[0]: p[1]}).encode()),
    st.tuples(st.integers(0, 60), st.binary(max_size=3)).map(
        lambda p: (raw := json.dumps(USER).encode())[: p[0]] + p[1] + raw[p[0] + 1 :]
    ),
    st.integers(1, 3000).map(lambda depth: b"[" * depth),
    st.integers(1, 3000).map(lambda depth: b'{"history":' + b"[" * depth + b"]" * depth + b"}"),
)


def assert_never_fails(app: Any, examples: int) -> None:
    refused = 0

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              derandomize=True)  # fmt: skip
    @given(st.sampled_from(("/recommend", "/score", "/similar")), BODIES)
    def ask(route: str, body: bytes) -> None:
        nonlocal refused
        reply = post(app, route, body)
        assert reply.status == 200 or 400 <= reply.status < 500, (reply.status, body)
        if reply.status != 200:
            refusal(reply, reply.status)
            refused += 1

    ask()
    assert refused > 0.7 * examples
    assert post(app, "/recommend", USER).status == 200


def test_malformed_bodies_are_refused_and_nothing_else_happens(app: Any) -> None:
    assert_never_fails(app, 20)


@pytest.mark.slow
def test_a_thousand_malformed_bodies(app: Any, ranking: Service) -> None:
    assert_never_fails(app, 1000)
    refused = 0
    ranked = make_app(ranking)
    for body in (b"", b"{}", b"[]", b'{"user": "u-07", "candidates": [1]}', b'{"user": "u-07", "candidates": [{}]}'):
        refused += post(ranked, "/score", body).status == 400
    assert refused == 5


class Page(HTMLParser):
    """Whether the tags of a page fit, and what it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.links = list[str](), list[str]()
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        if tag not in ("meta", "link", "input", "option"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_pages_need_no_network(app: Any, service: Service, ranking: Service) -> None:
    for made in (app, make_app(ranking)):
        for path in ("/", "/docs"):
            reply = get(made, path)
            page = Page(reply.body.decode())
            assert {link.split(":")[0] for link in page.links} <= {"docs", "metrics", "./", "openapi.json", "data"}
            assert "http" not in re.sub(r"location\.origin|https?://[^ ]* -H", "", reply.body.decode())
            assert "default-src 'none'" in reply.headers["content-security-policy"]
    docs = get(app, "/docs").body.decode()
    for said in ("POST /recommend", "POST /similar", "filter_seen", "request_time", "429", "of the checkpoint"):
        assert said in docs
    told = get(app, "/health").told
    assert told["users"] == 90 and told["columns"] == {"item": "what", "time": "when"}
    assert {"age", "price"} == set(told["features"])
    assert get(app, "/openapi.json").told["paths"].keys() >= {"/recommend", "/score", "/similar", "/reload"}


def test_a_server_answers_over_a_socket_and_ends_in_order(app: Any, service: Service) -> None:
    with listen("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP, "asyncio turns off Nagle's delay of such sockets alone"
        port, server = sock.getsockname()[1], Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for _ in range(2):
            client.request("POST", "/recommend", json.dumps(USER), {"Content-Type": "application/json"})
            reply = client.getresponse()
            assert reply.status == 200 and len(json.loads(reply.read())["items"]) == 3
        with pytest.raises(ValueError, match=f"--port = {port}: .*choose another"):
            listen("127.0.0.1", port)
        client.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.slow
def test_a_browser_asks_on_the_page(app: Any, service: Service, tmp_path: Path) -> None:
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not browser:
        pytest.skip("no Chromium here")
    probe = "<script>window.onload = () => document.querySelector('button').click();</script></body>"

    async def pressed(scope: Any, receive: Any, send: Any) -> None:
        """Show the page at /pressed with its button pressed."""
        if scope["type"] != "http" or scope["path"] != "/pressed":
            await app(scope, receive, send)
            return
        html = try_page(service.model).replace("</body>", probe).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": html})

    with listen("127.0.0.1", 0) as sock:
        port, server = sock.getsockname()[1], Server(pressed)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=15000",
        ]
        line = [browser, *flags, f"--user-data-dir={tmp_path}", "--dump-dom", f"http://127.0.0.1:{port}/pressed"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        server.should_exit = True
        thread.join(20)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    wanted = items_of(post(app, "/recommend", {"user": service.model.questions.users.originals[0].as_py()}))
    assert re.findall(r"<td>(sku \d+)</td>", done.stdout) == wanted and len(wanted) == 10
    assert "10 items in" in done.stdout and "/recommend -H" in done.stdout


def test_mistakes_of_the_command_are_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run-dir", str(place / "retrieval"), "--port", "0"]
    for words, flags in (
        ("holds no run", ["--run-dir", str(place), "--port", "0"]),
        ("--port = 70000", [*run[:2], "--port", "70000"]),
        ("--batch_size = 0", [*run, "--batch-size", "0"]),
        ("--watch = 0.0", [*run, "--watch", "0"]),
        ("--max_body = 0", [*run, "--max-body", "0"]),
        ("no memory tokens", [*run, "--memory", str(place)]),
    ):
        assert command.main(flags) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and error.startswith("error: ")
    monkeypatch.setenv(command.TOKEN, "")
    assert command.main(run) == 2 and f"{command.TOKEN} is empty" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "hstu.serving.app", None)
    monkeypatch.delenv(command.TOKEN)
    assert command.main(run) == 2 and "pip install 'hstu[serve]'" in capsys.readouterr().err


def started(run: Path, *flags: str) -> tuple[subprocess.Popen[str], int]:
    """Start the command, and return it and its port when it listens."""
    line = [sys.executable, "-m", "hstu.cli.serve", "--run-dir", str(run), "--port", "0", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for told in process.stdout:
        if found := re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\n", told):
            return process, int(found.group(1))
    raise AssertionError(process.stderr.read() if process.stderr else "")


def ask(port: int, path: str = "/recommend", body: Any = USER) -> tuple[int, Any]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    client.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    reply = client.getresponse()
    return reply.status, json.loads(reply.read())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_what_was_asked_is_answered(place: Path, number: signal.Signals) -> None:
    process, port = started(place / "retrieval", "--batch-wait", "1500")  # what is asked is still there at the signal
    found: list[tuple[int, Any]] = []
    threads = [threading.Thread(target=lambda: found.append(ask(port))) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(number)
    for thread in threads:
        thread.join(20)
    assert process.wait(20) == 128 + number and time.monotonic() - began < 10
    assert [status for status, _ in found] == [200] * 4
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_reload(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "retrieval"
    shutil.copytree(place / "retrieval", run, symlinks=True)
    point(run, "step_000000002")
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    process, port = started(run)
    wanted = ask(port)
    threading.Thread(target=lambda: pytest.raises(OSError, ask, port, "/reload", None), daemon=True).start()
    time.sleep(0.05)
    process.kill()
    process.wait(20)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    process, port = started(run)
    assert ask(port) == wanted and wanted[0] == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
