"""The least a gateway can be: FastAPI over httpx, and FastAPI over aiohttp's client.

python proxies.py httpx|aiohttp PORT ENGINE_URL KEY
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import aiohttp
import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse

JSON = {"content-type": "application/json"}


def checked(request: Request, key: str) -> None:
    """401 unless the key is the one."""
    if request.headers.get("authorization") != f"Bearer {key}":
        raise HTTPException(401)


def over_httpx(engine: str, key: str) -> FastAPI:
    """What one finds most often."""
    app = FastAPI()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1024)
    client = httpx.AsyncClient(base_url=engine, timeout=None, limits=limits)  # noqa: S113

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        checked(request, key)
        body = await request.body()
        asked = client.build_request("POST", request.url.path, content=body, headers=JSON)
        answer = await client.send(asked, stream=True)
        kind = answer.headers["content-type"]
        if "event-stream" not in kind:
            whole = await answer.aread()
            return Response(whole, answer.status_code, media_type=kind)

        async def events() -> AsyncIterator[bytes]:
            try:
                async for data in answer.aiter_raw():
                    yield data
            finally:
                await answer.aclose()

        return StreamingResponse(events(), answer.status_code, media_type=kind)

    return app


def over_aiohttp(engine: str, key: str) -> FastAPI:
    """The same, with a client that costs a tenth."""
    app = FastAPI()
    clients: list[aiohttp.ClientSession] = []

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        checked(request, key)
        if not clients:
            clients.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        body = await request.body()
        answer = await clients[0].post(engine + request.url.path, data=body, headers=JSON)
        kind = answer.headers["content-type"]
        if "event-stream" not in kind:
            return Response(await answer.read(), answer.status, media_type=kind)

        async def events() -> AsyncIterator[bytes]:
            async with answer:
                async for data in answer.content.iter_any():
                    yield data

        return StreamingResponse(events(), answer.status, media_type=kind)

    return app


def main() -> None:
    kind, port, engine, key = sys.argv[1:]
    app = {"httpx": over_httpx, "aiohttp": over_aiohttp}[kind](engine, key)
    uvicorn.run(app, port=int(port), loop="uvloop", http="httptools", log_level="warning")


if __name__ == "__main__":
    main()
