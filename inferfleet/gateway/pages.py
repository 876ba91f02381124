"""The small pages of the public side: which models there are, and whether anybody can answer."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from inferfleet.gateway.config import Config
from inferfleet.gateway.fronts import models as listed
from inferfleet.gateway.fronts import ollama, ollama_models, openai
from inferfleet.gateway.keys import ANYONE, Key, bearer
from inferfleet.gateway.private import can_serve
from inferfleet.gateway.request import BadRequest

if TYPE_CHECKING:
    from inferfleet.gateway.fronts.models import Names, Served
    from inferfleet.gateway.worker import Worker

JSON = "application/json"
LONGEST = 65536  # bytes of a body here; requests for tokens have their own bound


class Unanswered(Exception):
    """An error in the words of the API that was asked."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def pages(worker: Worker, served: list[Served], names: Names) -> FastAPI:
    """All of them. Those that carry tokens are App's."""
    app = FastAPI(
        title="inferfleet gateway",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # it would send clients to whatever host they name
    )

    def known(request: Request) -> Key:
        key = worker.keys.find(bearer(request.scope["headers"]), time.time())
        if key is None:
            raise Unanswered(401, "a valid API key is needed")
        return key

    def visible(key: Key) -> list[Served]:
        return [model for model in served if key.allows(model.name)]

    def broken() -> list[str]:
        now = worker.core.time()
        return [
            name
            for name, route in worker.core.routes.items()
            if not any(i.usable(now) for pool in route.active for i in pool.instances)
        ]

    @app.exception_handler(Unanswered)
    async def unanswered(request: Request, error: Unanswered) -> Response:
        return failed(request, error.status, error.message)

    @app.exception_handler(BadRequest)
    async def bad(request: Request, error: BadRequest) -> Response:
        return failed(request, error.status, error.message)

    @app.exception_handler(ClientDisconnect)
    async def left(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # which nobody gets

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def nothing(request: Request, _error: Exception) -> Response:
        return failed(request, 404, "there is nothing here")

    @app.get("/health")
    async def health() -> Response:
        able = can_serve(worker.core)
        return Response(
            b'{"ok":true}' if able else b'{"ok":false}', 200 if able else 503, None, JSON
        )

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        key = ANYONE if worker.config.public_models else known(request)
        found = listed.openai_models(visible(key), int(time.time()), broken())
        return Response(found, media_type=JSON)

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        key = ANYONE if worker.config.public_models else known(request)
        found = names.find(name)
        if found is None or not key.allows(found.name):
            raise Unanswered(404, f"The model `{name}` does not exist.")
        is_broken = found.name in broken()
        return Response(
            listed.openai_model(found, name, int(time.time()), is_broken), media_type=JSON
        )

    @app.api_route("/", methods=["GET", "HEAD"])
    async def greeting() -> Response:
        # Ollama's clients look for these words before they do anything else
        return Response(b"Ollama is running", media_type="text/plain")

    @app.api_route("/api/version", methods=["GET", "HEAD"])
    async def version() -> Response:
        return Response(ollama_models.version(), media_type=JSON)

    @app.api_route("/api/tags", methods=["GET", "HEAD"])
    async def tags(request: Request) -> Response:
        found = visible(known(request))
        return Response(ollama_models.tags(found, int(time.time())), media_type=JSON)

    @app.get("/api/ps")
    async def ps(request: Request) -> Response:
        return Response(ollama_models.ps(visible(known(request))), media_type=JSON)

    @app.post("/api/show")
    async def show(request: Request) -> Response:
        key = known(request)
        name, _ = ollama_models.asked(await body(request))
        found = names.find(name)
        if found is None or not key.allows(found.name):
            return answered(ollama_models.missing(name))
        return Response(ollama_models.show(found, int(time.time())), media_type=JSON)

    @app.post("/api/pull")
    async def pull(request: Request) -> Response:
        known(request)
        return answered(ollama_models.pull(await body(request), names))

    @app.api_route("/api/delete", methods=["DELETE"])
    @app.api_route("/api/create", methods=["POST"])
    @app.api_route("/api/copy", methods=["POST"])
    @app.api_route("/api/push", methods=["POST"])
    @app.api_route("/api/blobs/{digest}", methods=["POST", "HEAD"])
    async def change(request: Request) -> Response:
        known(request)
        return answered(ollama_models.refused())

    return app


def served(config: Config) -> list[Served]:
    """The configured models as clients see them."""
    return [
        listed.Served(
            name=name,
            aliases=tuple(model.aliases),
            context_length=model.context_length,
            max_output=model.max_output,
            tools=model.tools,
            vision=model.vision,
            embeddings=model.embeddings,
            providers=tuple(providers(config, model.pools)),
            details=model.details,
        )
        for name, model in config.models.items()
    ]


def providers(config: Config, pools: Iterable[str]) -> list[str]:
    """Who answers, each once."""
    return listed.unique(config.pools[pool].provider for pool in pools)


def answered(answer: ollama_models.Answer) -> Response:
    """A page of Ollama's."""
    return Response(answer.body, answer.status, media_type=answer.content_type)


def failed(request: Request, status: int, message: str) -> Response:
    """An error as the clients of that path read it."""
    ollamas = request.scope["path"].startswith("/api/")
    told = ollama.error if ollamas else openai.error
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return Response(told(status, message, kind), status, headers, JSON)


async def body(request: Request) -> bytes:
    """The body, if it is as small as these pages need."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > LONGEST:
            raise Unanswered(413, "the request is too large")
    return bytes(found)
