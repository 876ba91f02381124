"""Who may ask: keys kept as SHA-256, read again when their file changes.

`python -m inferfleet.gateway.keys NAME` makes a key and prints it, this once, with the entry
for the keys file.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

_LOG = logging.getLogger("inferfleet.gateway")
_LONGEST = 512  # bytes of a presented key that are worth a hash
_OTHER_HEADERS = frozenset((b"x-api-key", b"api-key"))


class KeysError(Exception):
    """The keys file cannot be used; the text begins with its path and never holds a key."""


@dataclass(frozen=True, slots=True)
class Key:
    """One client's key; None is no limit. `digest` is SHA-256, `expires` seconds since 1970."""

    name: str
    digest: bytes
    models: frozenset[str] | None = None
    requests_per_minute: int | None = None
    concurrency: int | None = None
    tokens_per_day: int | None = None
    expires: float | None = None

    def allows(self, model: str) -> bool:
        """Whether this key may use the model of that configured name."""
        return self.models is None or model in self.models


ANYONE = Key("", b"")  # whoever asks a gateway that has no keys


_Count = Annotated[int, msgspec.Meta(ge=1)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._@-]{1,64}\Z")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{64}\Z")]
    models: list[str] | None = None
    requests_per_minute: _Count | None = None
    concurrency: _Count | None = None
    tokens_per_day: _Count | None = None
    expires: str | None = None

    def key(self) -> Key:
        return Key(
            self.name,
            bytes.fromhex(self.sha256),
            None if self.models is None else frozenset(self.models),
            self.requests_per_minute,
            self.concurrency,
            self.tokens_per_day,
            None if self.expires is None else _moment(self.expires),
        )


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[_Entry]


class Keys:
    """The keys of one file; without a path anyone may ask. `problem` is why the last change
    of the file was not taken, or ""."""

    def __init__(self, path: Path | None) -> None:
        """Raises `KeysError` when there is a path and no usable file."""
        self.problem = ""
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._by_digest: dict[bytes, Key] = {}
        if path is not None:
            self._seen = _signature(path)
            self._by_digest = _read(path)

    def find(self, presented: bytes, now: float) -> Key | None:
        """The key that was presented, unless it is unknown or expired at `now` (seconds)."""
        if self._path is None:
            return ANYONE
        if len(presented) > _LONGEST:
            return None
        digest = hashlib.sha256(presented).digest()
        key = self._by_digest.get(digest)
        if key is None or not hmac.compare_digest(key.digest, digest):
            return None
        return None if key.expires is not None and now >= key.expires else key

    def refresh(self) -> bool:
        """Reads the file again if it has changed; a broken one changes nothing and is told once.

        True: other keys are in force.
        """
        if self._path is None or (seen := _signature(self._path)) == self._seen:
            return False
        self._seen = seen
        try:
            self._by_digest = _read(self._path)
        except KeysError as error:
            self.problem = str(error)
            _LOG.error("%s; the keys from before stay in force", error)
            return False
        self.problem = ""
        return True


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key in these ASGI headers, or nothing: `Authorization: Bearer` goes before the others."""
    other = b""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, rest = value.partition(b" ")
            if scheme.lower() == b"bearer" and (presented := rest.strip()):
                return presented
        elif name in _OTHER_HEADERS:
            other = other or value.strip()
    return other


def new_key() -> str:
    """256 random bits as OpenAI's clients expect a key to look."""
    return "sk-" + secrets.token_urlsafe(32)


def entry(name: str, key: str) -> str:
    """What the keys file says of this key, as JSON on one line."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    made = {"name": name, "sha256": digest}
    try:
        msgspec.convert(made, _Entry)
    except msgspec.ValidationError as error:
        raise KeysError(f"{name}: {error}") from None
    return msgspec.json.encode(made).decode()


def _signature(path: Path) -> tuple[int, ...]:
    """Equal while the file is the same; its ctime tells of a change of mode or owner too."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _read(path: Path) -> dict[bytes, Key]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o007:
                cure = f"chmod o= {shlex.quote(str(path))}"
                raise KeysError(f"{path}: others on this host can use it; run: {cure}")
            return _by_digest(msgspec.json.decode(file.read(), type=_File).keys)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise KeysError(f"{path}: {error}") from error


def _by_digest(entries: list[_Entry]) -> dict[bytes, Key]:
    keys: dict[bytes, Key] = {}
    names: set[str] = set()
    for key in (one.key() for one in entries):
        if key.name in names:
            raise ValueError(f"two keys have the name {key.name}")
        if key.digest in keys:
            raise ValueError(f"{keys[key.digest].name} and {key.name} are the same key")
        names.add(key.name)
        keys[key.digest] = key
    return keys


def _moment(text: str) -> float:
    """Seconds since 1970 of a date, which is the start of that day, or a time; UTC if unsaid."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"expires: {text!r} is neither a date nor a time (ISO 8601)") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def main(arguments: list[str]) -> int:
    """Prints a new key and its entry; 2 when not called with one good name."""
    if len(arguments) != 1:
        print("usage: python -m inferfleet.gateway.keys NAME", file=sys.stderr)
        return 2
    key = new_key()
    try:
        line = entry(arguments[0], key)
    except KeysError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"The key, shown only now:\n  {key}\nIts entry in the keys file:\n  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
