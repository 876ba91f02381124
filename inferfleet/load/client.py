"""One request, measured; and the first ones, which find out whether there is something there."""

from __future__ import annotations

import json
import ssl
import time
from dataclasses import replace

import aiohttp

from inferfleet.errors import Error
from inferfleet.load.statistics import Sample
from inferfleet.load.stream import Reader
from inferfleet.load.target import Target
from inferfleet.load.workload import PATHS, Prompts, Workload, body

CONNECT = 10.0  # seconds a connection may take
_KEEP = 4.0  # seconds an idle connection is used again; vLLM closes it after 5
_LISTED = {"openai": ("/v1/models", "data", "id"), "ollama": ("/api/tags", "models", "name")}
_CERTIFICATE = ("--ca FILE names the authority that signed it, and a phase's own certificate "
                "must be the one its balancer has")  # fmt: skip
_KINDS: tuple[tuple[type[BaseException], str], ...] = (  # the first that fits
    (aiohttp.ClientSSLError, "TLS"),
    (aiohttp.ClientConnectorError, "connect"),
    (aiohttp.ConnectionTimeoutError, "connect"),
    (TimeoutError, "timeout"),
    (aiohttp.ClientPayloadError, "cut"),
    (aiohttp.ServerDisconnectedError, "reset"),
    (aiohttp.ClientOSError, "reset"),
    (aiohttp.ClientError, "protocol"),
    (ValueError, "format"),
)


class Client:
    """Connections to one target. `timeout` is of a whole request, seconds."""

    def __init__(self, target: Target, timeout: float) -> None:
        self.target = target
        self._url = target.url + PATHS[target.api]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP, ssl=_tls(target)),
            timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT),
            headers={"Accept-Encoding": "identity", **_key(target)},
        )
        self._name = target.server_name or None

    async def close(self) -> None:
        await self._session.close()

    async def ask(self, content: bytes) -> Sample:
        """Send one request and read its stream to the end; what goes wrong is in the sample."""
        sample = Sample(time.perf_counter())
        try:
            async with self._session.post(
                self._url,
                data=content,
                headers={"Content-Type": "application/json"},
                server_hostname=self._name,
                allow_redirects=False,  # load goes where it was sent, and so does the key
            ) as response:
                if response.status == 200:
                    await _read(response, Reader(self.target.api), sample)
                else:
                    sample.error = f"status {response.status}"
                    sample.detail = self._hidden(_message(await response.text(errors="replace")))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            kind = _kind(error)
            sample.error = "cut" if kind == "reset" and sample.arrivals else kind
            sample.detail = self._hidden(_said(error))
        sample.ended = time.perf_counter()
        return sample

    def _hidden(self, text: str) -> str:
        """What a server says, short, and without the key should it repeat it."""
        key = self.target.key
        return " ".join((text.replace(key, "***") if key else text).split())[:300]

    async def named(self) -> Client:
        """Ask the target for its model where none was named. Raises Error."""
        if self.target.model:
            return self
        path, listed, name = _LISTED[self.target.api]
        try:
            async with self._session.get(
                self.target.url + path, server_hostname=self._name, allow_redirects=False
            ) as response:
                text = await response.text(errors="replace")
                _checked(self.target, response.status, self._hidden(_message(text)))
                found = [str(entry[name]) for entry in json.loads(text)[listed]]
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _failed(self.target, self._hidden(_said(error)), _kind(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise Error(f"{self.target.where}: {path} lists no models; say --model") from error
        if len(found) != 1:
            has = ", ".join(found) or "none"
            raise Error(f"{self.target.where}: which model? Say --model; it has {has}")
        self.target = replace(self.target, model=found[0])
        return self

    async def probe(self, prompts: Prompts, workload: Workload) -> Sample:
        """One short answer to a full prompt. Raises Error where there is none."""
        sample = await self.ask(self.body(prompts, workload, 2))
        if sample.error.startswith("status "):
            _checked(self.target, int(sample.error.split()[1]), sample.detail)
        if sample.error:
            raise _failed(self.target, sample.detail, sample.error)
        return sample

    def body(self, prompts: Prompts, workload: Workload, limit: int | None = None) -> bytes:
        """The next request."""
        return body(self.target.api, self.target.model, prompts.next(), workload, limit)


def _key(target: Target) -> dict[str, str]:
    return {"Authorization": f"Bearer {target.key}"} if target.key else {}


def _kind(error: BaseException) -> str:
    return next(kind for family, kind in _KINDS if isinstance(error, family))


def _checked(target: Target, status: int, said: str) -> None:
    if status in (401, 403):
        whose = f"the key of {target.user}" if target.user else "requests without a key"
        raise Error(f"{target.where} refuses {whose} (status {status})")
    if status != 200:
        raise Error(f"{target.where} answers with status {status}: {said}")


def _failed(target: Target, said: str, kind: str) -> Error:
    """One line for a target that does not answer as it should."""
    if kind == "TLS":
        return Error(f"{target.where}: its certificate is not trusted: {said}. {_CERTIFICATE}")
    if kind == "connect":
        return Error(f"{target.where} cannot be reached: {said}")
    return Error(f"{target.where} gives no answer ({kind}): {said}")


def _said(error: BaseException) -> str:
    """What happened, without aiohttp's own frame of words around it."""
    inner = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return str(inner) or type(inner).__name__


def _message(text: str) -> str:
    """What an error's body says: its message, where it is JSON with one."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return text
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


async def _read(response: aiohttp.ClientResponse, reader: Reader, sample: Sample) -> None:
    arrivals = sample.arrivals
    async for data in response.content.iter_any():
        now = time.perf_counter()
        for _ in range(reader.feed(data)):
            arrivals.append(now)
    sample.prompt_tokens = reader.prompt_tokens
    sample.counted = reader.tokens is None
    sample.tokens = len(arrivals) if reader.tokens is None else reader.tokens
    if reader.error:
        sample.error, sample.detail = "error event", reader.error[:300]
    elif not reader.whole:
        sample.error, sample.detail = "cut", "the stream ended without an end"
    elif not arrivals:
        sample.error, sample.detail = "empty", "an answer without a token"


def _tls(target: Target) -> ssl.SSLContext | bool:
    """With a pinned certificate that one alone is trusted, whatever name it bears."""
    if not target.url.startswith("https:"):
        return True
    if not target.pinned:
        return ssl.create_default_context(cafile=target.ca or None)
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.check_hostname = False
    trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trust.load_verify_locations(cadata=_first(target.pinned))
    return trust


def _first(chain: str) -> str:
    """The server's own certificate, which comes first in a chain."""
    end = "-----END CERTIFICATE-----"
    head, found, _ = chain.partition(end)
    if not found:
        raise Error("the phase's certificate is no PEM file")
    return head + end + "\n"
