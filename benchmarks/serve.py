"""A server under load on loopback: requests a second, and how long the median and the slowest of a hundred wait.

    python benchmarks/serve.py [--items 1682 1000000] [--clients 1 16 64] [--seconds 8] [--threads 2]

Two runs of HSTU, two layers of width 64, after one training step (time does not depend on the weights): one with the
sizes of MovieLens 100K (943 users, 1,682 items, 100,000 events), one with as many users and a million items.
``python -m hstu.cli.serve`` runs in a process of its own, the clients in this one, so that both share the cores: as
many connections as clients, each of which asks for ten items, waits for the answer, and asks again. Who asks: "user", a
random user of the data set; "events", the same with three later events, whose cache is found from the second time on;
"history", 50 events of somebody else. Every answer has to be of status 200 and hold ten items.
Writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from record import write_record

from hstu.data import EncodedDataset, Feature, Schema, write_dataset
from hstu.data.schema import count_statistics

ROOT = Path(__file__).resolve().parents[1]
USERS, EVENTS = 943, 100_000
LAST = 2 * 10**9  # no event is later
BINDINGS = (
    "DatasetArgs.dataset_name='load'",
    "DatasetArgs.max_history_seqlen=200",
    "NetworkArgs.num_layers=2",
    "NetworkArgs.hidden_size=64",
    "NetworkArgs.num_attention_heads=4",
    "NetworkArgs.kv_channels=16",
    "NetworkArgs.item_embedding='local'",
    "RetrievalArgs.eval_metrics=('HR@10',)",
    "RetrievalArgs.filter_seen=True",
    "TrainerArgs.train_batch_size=32",
    "TrainerArgs.eval_batch_size=64",
    "TrainerArgs.max_train_iters=1",
    "RetrievalArgs.num_negatives=64",
    "OptimizerArgs.optimizer_str='adam'",
    "OptimizerArgs.learning_rate=1e-3",
    "TrainerArgs.loggers=()",
    "TrainerArgs.report=False",
)


def train(place: Path, items: int, environment: dict[str, str]) -> None:
    """Write a random log of ``items`` items, and the run of one step."""
    rng = np.random.default_rng(0)
    lengths = 20 + rng.multinomial(EVENTS - 20 * USERS, rng.dirichlet(np.full(USERS, 0.8)))
    features = (
        Feature(name="user", role="user", vocab_size=USERS),
        Feature(name="item", role="item", vocab_size=items),
        Feature(name="time", role="time"),
    )
    owner = np.repeat(np.arange(USERS), lengths)
    clock = rng.integers(10**9, 10**9 + 10**7, EVENTS)
    events = {"item": rng.integers(items, size=EVENTS), "time": clock[np.lexsort((clock, owner))]}
    vocabularies = {
        "user": pa.array([f"u{n}" for n in range(USERS)]),
        "item": pa.array([f"i{n}" for n in range(items)]),
    }
    schema = Schema(name="load", features=features, counts=count_statistics(lengths, items))
    data = EncodedDataset(schema=schema, lengths=lengths, contexts={}, events=events, vocabularies=vocabularies)
    write_dataset(data, place / "tmp_data" / "load")
    (place / "load.gin").write_text("\n".join(BINDINGS))
    script = [sys.executable, str(ROOT / "examples" / "pretrain_gr_retrieval.py"), "--gin-config-file", "load.gin"]
    subprocess.run([*script, "--run-dir", "run"], cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)


def body(kind: str, items: int, rng: np.random.Generator) -> bytes:
    """Return a question."""
    user = int(rng.integers(USERS))
    asked: dict[str, Any] = {"k": 10}
    if kind == "history":
        chosen = rng.integers(items, size=50)
        asked["history"] = [{"item": f"i{item}", "time": 10**9 + 60 * n} for n, item in enumerate(chosen)]
    else:
        asked["user"] = f"u{user}"
    if kind == "events":  # of a user always the same, so that a cache of them is found
        asked["events"] = [{"item": f"i{(user * 7 + n) % items}", "time": LAST + n} for n in range(3)]
    return json.dumps(asked).encode()


async def client(port: int, kind: str, items: int, until: float, rng: np.random.Generator) -> list[float]:
    """Ask on one connection until then, and return the seconds of each answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took = []
    while (began := time.perf_counter()) < until:
        raw = body(kind, items, rng)
        head = ("POST /recommend HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(raw)}")
        writer.write("\r\n".join((*head, "", "")).encode() + raw)
        answer = await reader.readuntil(b"\r\n\r\n")
        told = re.search(rb"content-length: (\d+)", answer)
        assert told is not None
        content = await reader.readexactly(int(told[1]))
        if not answer.startswith(b"HTTP/1.1 200") or len(json.loads(content)["items"]) != 10:
            raise RuntimeError(content.decode())
        took.append(time.perf_counter() - began)
    writer.close()
    return took


def load(port: int, kind: str, items: int, clients: int, seconds: float) -> dict[str, float]:
    """Return requests a second, and milliseconds."""

    async def all_clients(until: float) -> list[list[float]]:
        return await asyncio.gather(
            *(client(port, kind, items, until, np.random.default_rng(n)) for n in range(clients))
        )

    asyncio.run(all_clients(time.perf_counter() + 1.0))  # warm, and caches made
    began = time.perf_counter()
    took = np.array([t for each in asyncio.run(all_clients(began + seconds)) for t in each])
    p50, p99 = (float(np.percentile(took, q)) * 1000 for q in (50, 99))
    return {"requests_per_s": len(took) / (time.perf_counter() - began), "p50_ms": p50, "p99_ms": p99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1682, 1_000_000])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--kinds", nargs="+", default=["user", "events", "history"])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2, help="of the server's model")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "serve.json")
    args = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)}
    rows = []
    for items in args.items:
        with tempfile.TemporaryDirectory() as folder:
            train(Path(folder), items, environment)
            line = [sys.executable, "-m", "hstu.cli.serve", "--run-dir", "run", "--port", "0"]
            began = time.perf_counter()
            server = subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
            assert server.stdout is not None
            port = next(int(found[1]) for told in server.stdout if (found := re.search(r"127.0.0.1:(\d+)/", told)))
            ready = time.perf_counter() - began
            for kind in args.kinds:
                for clients in args.clients:
                    found = load(port, kind, items, clients, args.seconds)
                    rows.append({"items": items, "kind": kind, "clients": clients, "ready_s": ready, **found})
                    print(f"{items:>9,} items {kind:8}{clients:>3} clients: {found['requests_per_s']:7.1f} requests/s, "
                          f"p50 {found['p50_ms']:7.1f} ms, p99 {found['p99_ms']:7.1f} ms")  # fmt: skip
            server.send_signal(signal.SIGTERM)
            server.wait(20)
    write_record(args.output, threads=args.threads, users=USERS, events=EVENTS, rows=rows)


if __name__ == "__main__":
    main()
