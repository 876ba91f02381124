"""What differs between the kinds of engines behind their OpenAI-like API.

TGI: huggingface/text-generation-inference 3.3, router/src and backends/v3. vLLM: 0.6 to 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from inferfleet.gateway.request import Backend, Call

HEALTH: dict[Backend, str] = {
    "vllm": "/health",
    "tgi": "/health",
    "ollama": "/api/version",
    "openai": "/v1/models",
}
METERED: frozenset[Backend] = frozenset({"vllm", "tgi"})  # kinds that have /metrics
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_LONGEST = 500  # characters of an error that is no JSON

_RUNNING = {"vllm": "vllm:num_requests_running", "tgi": "tgi_batch_current_size"}
_WAITING = {"vllm": "vllm:num_requests_waiting", "tgi": "tgi_queue_size"}
_PROGRESS = {
    "vllm": (
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:iteration_tokens_total_sum",
    ),
    # counts of tokens move when a request ends, this one with every step of the batch
    "tgi": ("tgi_batch_inference_success", "tgi_request_generated_tokens_sum"),
}


class Load(NamedTuple):
    """Requests at work and in the engine's queue; `tokens` moves whenever the engine does."""

    running: int
    waiting: int
    tokens: float | None


def parse_load(kind: Backend, metrics_text: str) -> Load | None:
    """The load in a page of metrics, summed over its engines; None for a page without it."""
    if kind not in METERED:
        return None
    text = "\n" + metrics_text
    running = _total(text, _RUNNING[kind])
    waiting = _total(text, _WAITING[kind])
    if running is None and waiting is None:
        return None
    moved = [value for name in _PROGRESS[kind] if (value := _total(text, name)) is not None]
    return Load(int(running or 0), int(waiting or 0), sum(moved) if moved else None)


def _total(text: str, name: str) -> float | None:
    """The sum of a metric's series; None: there are none."""
    found, place, start = None, 0, "\n" + name
    while (place := text.find(start, place)) >= 0:
        place += len(start)
        end = text.find("\n", place)
        line = text[place : end if end >= 0 else len(text)]
        if line[:1] not in ("{", " "):  # another metric whose name begins alike
            continue
        try:
            value = float(line[line.rfind("}") + 1 :].split()[0])
        except (ValueError, IndexError):
            continue
        if value == value and abs(value) != float("inf"):
            found = (found or 0.0) + value
    return found


def probe(kind: Backend, model: str, embeddings: bool = False) -> Call:
    """The cheapest request that only an engine which makes tokens (or vectors) can answer."""
    if embeddings:
        path = "/api/embed" if kind == "ollama" else "/v1/embeddings"
        return Call(path, msgspec.json.encode({"model": model, "input": "1"}))
    body: dict[str, Any] = {"model": model}
    if kind == "ollama":
        options = {"num_predict": 1, "temperature": 0}
        body |= {"prompt": "1", "raw": True, "stream": False, "options": options}
        return Call("/api/generate", msgspec.json.encode(body))
    body |= {"max_tokens": 1, "temperature": 0}
    if kind == "openai":  # most providers have no completions any more
        body["messages"] = [{"role": "user", "content": "1"}]
        return Call("/v1/chat/completions", msgspec.json.encode(body))
    return Call("/v1/completions", msgspec.json.encode(body | {"prompt": "1"}))


def proves(body: bytes) -> bool:
    """Whether an answer to a probe has a token or a vector in it."""
    found = _read(body)
    if not isinstance(found, dict):
        return False
    usage = found.get("usage")
    if isinstance(usage, dict) and usage.get("completion_tokens"):
        return True
    if found.get("eval_count") or found.get("response"):
        return True
    return any(
        _filled(one) for key in ("choices", "data", "embeddings") for one in _list(found, key)
    )


def _list(found: dict[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    return value if isinstance(value, list) else []


def _filled(one: Any) -> bool:
    """Whether a choice has text, or a vector numbers."""
    if not isinstance(one, dict):
        return bool(one)
    message = one.get("message")
    if isinstance(message, dict):
        return any(message.get(key) for key in ("content", "reasoning", "reasoning_content"))
    return bool(one.get("text") or one.get("embedding"))


_TYPES = {  # names of TGI and vLLM; others are OpenAI's already, or as good
    "validation": "invalid_request_error",
    "BadRequestError": "invalid_request_error",
    "UnprocessableEntityError": "invalid_request_error",
    "NotFoundError": "not_found_error",
    "overloaded": "rate_limit_error",
}


def error_text(body: bytes) -> tuple[str, str]:
    """What an engine's error says, and its type in OpenAI's words."""
    message, kind = _told(_read(body))
    if not message:
        text = body[: 4 * _LONGEST].decode("utf-8", "replace").strip()
        message = "the engine gave no reason" if not text or text[0] in "<{[" else text[:_LONGEST]
    return message, _TYPES.get(kind, kind) or "server_error"


def _told(found: Any) -> tuple[str, str]:
    """Message and type in any of the shapes that engines have had; empty where there is none."""
    if isinstance(found, list):  # Gemini's API puts its error into a list
        return _told(found[0]) if found else ("", "")
    if not isinstance(found, dict):
        return (found, "") if isinstance(found, str) else ("", "")
    inner = found.get("error")
    if isinstance(inner, dict):
        return _told({"message": inner.get("message"), "type": inner.get("type")})
    if isinstance(inner, str):  # TGI with error_type; Ollama, and vLLM's 401, without
        return inner, _text(found.get("error_type"))
    if "detail" in found:  # FastAPI
        return _detail(found["detail"]), "invalid_request_error"
    return _text(found.get("message")), _text(found.get("type"))  # vLLM until 0.9


def _detail(detail: Any) -> str:
    """FastAPI's text, or its list of what is wrong where."""
    if not isinstance(detail, list):
        return _text(detail)
    told = []
    for one in detail:
        if isinstance(one, dict):
            where = ".".join(str(part) for part in _list(one, "loc"))
            told.append(f"{where}: {_text(one.get('msg'))}" if where else _text(one.get("msg")))
    return "; ".join(told)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _read(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except _UNREADABLE:
        return None


def adapt(kind: Backend, body: dict[str, Any]) -> dict[str, Any]:
    """The body without what this kind refuses or overlooks; the same object if all is well."""
    change = _ADAPT.get(kind)
    return change(body) if change else body


def _for_ollama(body: dict[str, Any]) -> dict[str, Any]:
    """openai/openai.go knows only max_tokens, and models' templates no developer."""
    found = body
    if "max_completion_tokens" in body:
        found = {k: v for k, v in body.items() if k != "max_completion_tokens"}
        found.setdefault("max_tokens", body["max_completion_tokens"])
    said = found.get("messages")
    if isinstance(said, list) and any(_developer(one) for one in said):
        renamed = [{**one, "role": "system"} if _developer(one) else one for one in said]
        found = {**found, "messages": renamed}
    return found


def _developer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "developer"


def _for_tgi(body: dict[str, Any]) -> dict[str, Any]:
    """Its router's ChatRequest: stop is a list, top_p below 1, and it has its own grammars."""
    found = dict(_for_ollama(body))
    if isinstance(found.get("stop"), str):
        found["stop"] = [found["stop"]]
    top_p = found.get("top_p")
    if isinstance(top_p, int | float) and top_p >= 1:
        del found["top_p"]  # all tokens: what it does without
    found.pop("logit_bias", None)  # a list there, and unused
    if isinstance(found.get("response_format"), dict):
        found["response_format"] = _grammar(found["response_format"])
    return body if found == body else found


def _grammar(wanted: dict[str, Any]) -> dict[str, Any] | None:
    """TGI has the schema under `value`, and no JSON without one."""
    match wanted:
        case {"value": _}:
            return wanted
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return {"type": "json_object", "value": schema}
        case {"type": "json_object"}:
            return {"type": "json_object", "value": {"type": "object"}}
    return None


_ADAPT: dict[Backend, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ollama": _for_ollama,
    "tgi": _for_tgi,
}
