"""The routes: a service over HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from hstu.serving.batching import AnswerError, OverloadedError, StoppingError
from hstu.serving.bodies import Items, Neighbours, Recommend, Score, Scored, Similar
from hstu.serving.guard import Guard, said
from hstu.serving.model import Answer, ServedModel
from hstu.serving.pages import docs_page, try_page
from hstu.serving.questions import Question, Questions
from hstu.serving.service import Service

logger = logging.getLogger(__name__)

_Body = TypeVar("_Body", Recommend, Score, Similar)
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "what was asked cannot be answered; `error` says why in one line"},
    401: {"description": "the token is missing or wrong"},
    413: {"description": "the body is too large"},
    429: {"description": "too many questions wait; ask again after Retry-After seconds"},
}


def make_app(service: Service, *, max_body: int = 1 << 20, token: str | None = None) -> Guard:
    """Return the ASGI application of ``service``.

    Args:
        service: What answers.
        max_body: Bytes of a body.
        token: What clients have to say in ``Authorization: Bearer``; None: nothing.
    """
    app = FastAPI(title="hstu", version="1", description=__doc__, docs_url=None, redoc_url=None)
    _add_questions(app, service)
    _add_pages(app, service)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _refused)
    routes = {path for route in app.routes if (path := getattr(route, "path", None))}
    return Guard(app, metrics=service.metrics, routes=routes, max_body=max_body, token=token)


def _add_questions(app: FastAPI, service: Service) -> None:
    async def answered(body: _Body, read: Callable[[Questions, _Body], Question], name: str) -> Response:
        model: ServedModel = service.model
        try:
            question = await run_in_threadpool(read, model.questions, body)
            answer: Answer = await asyncio.wrap_future(service.batches.ask(model, question))
        except OverloadedError:
            waiting = service.options.max_waiting
            return _error(429, f"{waiting} questions wait already; ask again later", {"Retry-After": "1"})
        except StoppingError:
            return _error(503, "the server is about to end", {"Retry-After": "1"})
        except AnswerError as error:
            return _error(500, str(error))
        except ValueError as error:
            return _error(400, str(error))
        return _json({"step": model.step, name: answer})

    @app.post("/recommend", response_model=Items, responses=_ERRORS)
    async def recommend(body: Recommend) -> Response:
        """Return the best items of a user of the data set, or after a history."""
        return await answered(body, Questions.recommend, "items")

    @app.post("/score", response_model=Scored, responses=_ERRORS)
    async def score(body: Score) -> Response:
        """Score given items for a user of the data set, or after a history; without any history there is no score."""
        return await answered(body, Questions.score, "scores")

    @app.post("/similar", response_model=Neighbours, responses=_ERRORS)
    async def similar(body: Similar) -> Response:
        """Return the items whose vectors are closest to those of given ones, by cosine."""
        return await answered(body, Questions.similar, "similar")

    @app.post("/reload", responses=_ERRORS)
    async def reload() -> Response:
        """Take up the checkpoint that is the best now, or whichever the server was started with; none is dropped."""
        try:
            model = await run_in_threadpool(service.reload)
        except ValueError as error:
            return _error(400, str(error))
        return _json({"step": model.step})


def _add_pages(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Say what is served, and in which columns histories are given."""
        model = service.model
        columns, schema = model.questions.columns, model.opened.dataset.schema
        has = {"item": True, "time": schema.time is not None, "action": columns.use_actions}
        return _json(
            {
                "status": "ok",
                "run": model.opened.run.path.name,
                "task": model.opened.config.task,
                "step": model.step,
                "users": len(model.questions.users.originals),
                "items": len(model.questions.items.originals),
                "columns": {role: getattr(columns, role) for role, there in has.items() if there},
                "features": [*columns.contexts, *columns.features],
            }
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return counters in the text format of Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page(try_page(service.model))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _page(docs_page(app.openapi()))


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(said(content), status, headers, media_type="application/json")


def _error(status: int, line: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": " ".join(line.split())}, status, headers)


def _page(html: str) -> Response:
    allowed = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    return HTMLResponse(html, headers={"Content-Security-Policy": allowed + "; img-src data:; form-action 'none'"})


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # Of a place in the body only what a client wrote; names of alternatives look like "dict[str,...]" or "int".
    place = [str(part) for part in first["loc"][1:] if isinstance(part, int) or str(part) in _NAMES]
    if first["type"] == "json_invalid":
        return _error(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    unknown = str(first["loc"][-1]) if first["type"] == "extra_forbidden" else None
    if unknown is not None:
        return _error(400, f"{unknown[:100]!r}: there is no such field")
    where = ".".join(place) or "body"
    return _error(400, f"{where}: {first['msg']}")


_NAMES = {name for body in (Recommend, Score, Similar) for name in body.model_fields}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail), dict(error.headers or {}))
