"""Answers over HTTP are those of predict and of Python, however many ask at once and whatever is kept of a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import hstu
from hstu.data.requests import LAST
from hstu.serving.app import make_app
from hstu.serving.questions import Asker, BestItems
from hstu.serving.service import Service
from tests.serving.client import Reply, post, post_all
from tests.serving.conftest import history_of, later_events, serve


def items_of(reply: Reply) -> list[str]:
    assert reply.status == 200, reply.body
    return [each["item"] for each in reply.told["items"]]


def assert_same(reply: Reply, wanted: pl.DataFrame) -> None:
    assert items_of(reply) == wanted["item"].to_list() and wanted.height
    assert np.allclose([each["score"] for each in reply.told["items"]], wanted["score"], atol=1e-6)


def test_a_batch_of_all_users_is_the_file_of_predict(service: Service, run: hstu.Run) -> None:
    users = run.recommend(k=7).partition_by("user", maintain_order=True, as_dict=True)
    questions = [
        BestItems(asker=Asker(row=row, later=None, time=LAST), k=7, filter_seen=True, items=None) for row in range(90)
    ]
    # In the batches of predict, which the last digits of a score may depend on.
    size = service.model.loader.batch_size
    found = [answer for n in range(0, 90, size) for answer in service.model.answer(questions[n : n + size])]
    for name, answer in zip(service.model.questions.users.originals.to_pylist(), found, strict=True):
        wanted = users[(name,)]
        assert [(each["item"], each["score"]) for each in answer] == list(wanted.select("item", "score").iter_rows())


def test_users_who_ask_at_once_are_answered_each(app: Any, service: Service, run: hstu.Run) -> None:
    asked = [
        {"user": "u-07", "k": 3},
        {"user": "u-41", "k": 60, "filter_seen": False},
        {"user": "u-07", "k": 60},
        {"user": "u-12", "candidates": ["sku 7", "sku 14", "sku 21"], "filter_seen": False},
        {"user": "u-41", "candidates": ["sku 7", "sku 14", "sku 21"]},
        {"user": "u-33", "k": 5, "request_time": 2_000_000_000},
    ]
    before = service.model.ways["whole"]
    replies = post_all(app, "/recommend", asked)
    for body, reply in zip(asked, replies, strict=True):
        more = {name: body[name] for name in ("k", "filter_seen", "request_time") if name in body}
        wanted = run.recommend([body["user"]], items=body.get("candidates"), **more)
        if not wanted.height:
            assert items_of(reply) == []
        else:
            assert_same(reply, wanted)
    assert service.model.ways["whole"] - before == len(asked)
    sizes = service.metrics.batch_size.collect()[0].samples
    assert max(s.value for s in sizes if s.name.endswith("_sum")) > max(
        s.value for s in sizes if s.name.endswith("_count")
    ), "some were answered together"


def test_a_history_is_answered_as_a_file_of_it(app: Any, run: hstu.Run) -> None:
    for user in ("u-07", "u-41"):
        events, features = history_of(user)
        frame = pl.DataFrame(events).with_columns(
            pl.lit(user).alias("who"), **{k: pl.lit(v) for k, v in features.items()}
        )
        assert_same(post(app, "/recommend", {"history": events, "features": features, "k": 9}),
                    run.recommend(histories=frame, k=9))  # fmt: skip
    assert items_of(post(app, "/recommend", {"history": [], "features": features})) == []


def test_later_events_go_on_from_what_is_kept(place: Path, run: hstu.Run) -> None:
    service = serve(place / "retrieval")
    app, caches = make_app(service), service.model.caches
    assert caches is not None and caches.works
    users = ("u-07", "u-41", "u-12")
    for number in (1, 2, 2, 4):  # nothing is kept, one more event, the same again, two more
        replies = post_all(app, "/recommend", [{"user": u, "events": later_events(u, number), "k": 9} for u in users])
        for user, reply in zip(users, replies, strict=True):
            assert_same(reply, expected(run, user, number))
    assert (caches.misses, caches.hits, len(caches)) == (3, 9, 3) and service.model.ways["cache"] == 12
    other = [dict(event, what="sku 3") for event in later_events("u-07", 4)]
    assert items_of(post(app, "/recommend", {"user": "u-07", "events": other, "k": 9})) and caches.misses == 4
    service.close()


def test_a_cache_takes_no_more_than_it_may(place: Path, run: hstu.Run) -> None:
    service = serve(place / "retrieval", model={"cache_bytes": 5000})
    app, caches = make_app(service), service.model.caches
    assert caches is not None
    for user in ("u-07", "u-41", "u-12", "u-33", "u-07"):
        assert_same(post(app, "/recommend", {"user": user, "events": later_events(user, 2), "k": 9}),
                    expected(run, user, 2))  # fmt: skip
        assert caches.num_bytes == sum(kept.cache.num_bytes for kept in caches._kept.values()) <= 5000
    assert 0 < len(caches) < 4
    service.close()


def expected(run: hstu.Run, user: str, number: int) -> pl.DataFrame:
    """What the file of a history with later events gives."""
    events, features = history_of(user)
    frame = pl.DataFrame([*events, *later_events(user, number)], infer_schema_length=None)
    frame = frame.with_columns(pl.lit(user).alias("who"), **{k: pl.lit(v) for k, v in features.items()})
    return run.recommend(histories=frame, k=9)


def test_scores_of_pairs(app: Any, run: hstu.Run) -> None:
    items = ["sku 7", "sku 0", "sku 7", "sku 59"]
    reply = post(app, "/score", {"user": "u-07", "candidates": items, "missing_features": "allow"})
    pairs = pl.DataFrame({"who": ["u-07"] * 4, "what": items})
    wanted = run.score(pairs, missing_features="allow")
    assert [each["item"] for each in reply.told["scores"]] == items
    assert np.allclose([each["score"] for each in reply.told["scores"]], wanted["score"], atol=1e-6)


def test_scores_of_a_ranking_run(ranking: Service, place: Path) -> None:
    app, run = make_app(ranking), hstu.open_run(place / "ranking", frames="polars")
    users = ["u-07", "u-41", "u-07"]
    rows = [{"what": f"sku {n}", "price": float(n)} for n in range(4)]
    bodies: list[dict] = [{"user": user, "candidates": rows[: n + 2]} for n, user in enumerate(users)]
    events, features = history_of("u-12")
    bodies.append({"history": events, "features": features, "candidates": rows})
    for body, reply in zip(bodies, post_all(app, "/score", bodies), strict=True):
        pairs = pl.DataFrame(body["candidates"]).with_columns(who=pl.lit(body.get("user", "u-12")))
        frame = None
        if "history" in body:
            frame = pl.DataFrame(events).with_columns(who=pl.lit("u-12"), **{k: pl.lit(v) for k, v in features.items()})
        wanted = run.score(pairs, histories=frame)
        assert reply.status == 200 and wanted.height == len(reply.told["scores"])
        for name in ("score_0", "score_1"):
            assert np.allclose([each[name] for each in reply.told["scores"]], wanted[name], atol=1e-6)
    refused = post(app, "/recommend", {"user": "u-07"})
    assert refused.status == 400 and "ranking run, use /score" in refused.told["error"]


def test_similar_items(app: Any, run: hstu.Run) -> None:
    reply = post(app, "/similar", {"items": ["sku 7", "sku 0"], "k": 4})
    wanted = run.similar_items(["sku 7", "sku 0"], k=4)
    for told in reply.told["similar"]:
        mine = wanted.filter(pl.col("item") == told["item"])
        assert [each["item"] for each in told["similar"]] == mine["similar"].to_list()
        assert np.allclose([each["score"] for each in told["similar"]], mine["score"], atol=1e-6)
