"""How the two APIs send tokens: OpenAI's server-sent events, Ollama's JSON lines. Pure."""

from __future__ import annotations

import json
from typing import Any

from inferfleet.load.workload import Api

_SAID = ("content", "reasoning_content", "reasoning", "thinking", "tool_calls")  # tokens are in


class Reader:
    """One answer, fed as it arrives, in pieces cut anywhere.

    `whole` is whether it ended as it should; `error` what the server said instead. Token counts
    are the server's own, None until it has told them.
    """

    def __init__(self, api: Api) -> None:
        self.whole = False
        self.error = ""
        self.tokens: int | None = None
        self.prompt_tokens: int | None = None
        self._line = self._ollama if api == "ollama" else self._openai
        self._rest = b""

    def feed(self, data: bytes) -> int:
        """How many chunks in these bytes brought tokens. Raises ValueError for what is no JSON."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return sum(self._line(line) for line in lines if line.strip())

    def _openai(self, line: bytes) -> bool:
        if not line.startswith(b"data:"):
            return False  # a comment, or a field that says nothing here
        data = line[5:].strip()
        if data == b"[DONE]":
            self.whole = True
            return False
        event = _object(data)
        if self._failed(event):
            return False
        if isinstance(usage := event.get("usage"), dict):
            self.tokens = usage.get("completion_tokens")
            self.prompt_tokens = usage.get("prompt_tokens")
        choices = event.get("choices") or [{}]
        self.whole |= bool(choices[0].get("finish_reason"))
        return _says(choices[0].get("delta"))

    def _ollama(self, line: bytes) -> bool:
        event = _object(line)
        if self._failed(event):
            return False
        if event.get("done"):
            self.whole = True
            self.tokens = event.get("eval_count")
            self.prompt_tokens = event.get("prompt_eval_count")
        return _says(event.get("message"))

    def _failed(self, event: dict[str, Any]) -> bool:
        error = event.get("error")
        if error:
            self.error = str(error.get("message", error) if isinstance(error, dict) else error)
        return bool(error)


def _object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("an event that is no JSON object")
    return value


def _says(message: Any) -> bool:
    return isinstance(message, dict) and any(message.get(field) for field in _SAID)
