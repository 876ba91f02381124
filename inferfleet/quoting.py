"""One quoting filter per file format: no value can break out of the place it is written to.

Templates may only print what went through one of these (`inferfleet.render` refuses anything
else), so a forgotten filter is an error at render time, not a hole on a host.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from inferfleet.errors import RenderError

_WORD = re.compile(r"[A-Za-z0-9_.:/@+,=~\[\]*-]+")
_BEARER = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1: b64token
_BARE = re.compile(r"[A-Za-z0-9_./:=,@+-]+")
_UNIT = re.compile(r"[A-Za-z0-9:_.@\\-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_YAML = re.compile(r'["\\]|[^ -~]')


class Quoted(str):
    """Text that is already written in the format of the file it goes to."""

    __slots__ = ()


class Mask(str):
    """What stands for a secret in a review: written as it is, whatever the value may be."""

    __slots__ = ()


def word(value: object) -> Quoted:
    """A bare word that means the same in every format; anything else is refused."""
    text = str(value)
    if not _WORD.fullmatch(text):
        raise RenderError(f"{text!r} is not a plain word: quote it in the file's format")
    return Quoted(text)


def _c_escape(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", escaped)


def _no_nul(text: str) -> str:
    if "\x00" in text:
        raise RenderError("a NUL byte cannot be passed to a program")
    return text


def unit_argument(value: object) -> Quoted:
    """One argument of an `ExecStart=` line (systemd.service(5), "Command lines")."""
    if _BARE.fullmatch(str(value)):
        return Quoted(value)
    text = _c_escape(_no_nul(str(value))).replace("%", "%%").replace("$", "$$")
    return Quoted(f'"{text}"')


def unit_command(values: Sequence[object]) -> Quoted:
    """A whole `ExecStart=` line, broken before each option so that people can read a diff."""
    line = ""
    for value in values:
        separator = " \\\n    " if str(value).startswith("--") else " "
        line += (separator if line else "") + unit_argument(value)
    return Quoted(line)


def unit_environment(value: object, name: str) -> Quoted:
    """The value of an `Environment=` line; `$` has no meaning there (systemd.exec(5))."""
    text = _c_escape(_no_nul(str(value))).replace("%", "%%")
    return Quoted(f'"{word(name)}={text}"')


def unit_name(value: object) -> Quoted:
    """A unit's name where units are listed: a backslash stands for itself there."""
    if not _UNIT.fullmatch(str(value)):
        raise RenderError(f"{str(value)!r} is not the name of a unit")
    return Quoted(value)


def unit_text(value: object) -> Quoted:
    """Free text such as `Description=`: shown to people, so controls become spaces."""
    text = _CONTROL.sub(" ", str(value)).replace("\\", " ").replace("%", "%%")
    return Quoted(" ".join(text.split()) or "-")


def environment_file(value: object) -> Quoted:
    """A value in an `EnvironmentFile=`, read by systemd and by compose alike."""
    text = str(value)
    if _CONTROL.search(text):
        raise RenderError("an environment file cannot hold control characters or line breaks")
    return Quoted('"' + re.sub(r'(["\\$])', r"\\\1", text) + '"')


def bearer(value: object) -> Quoted:
    """An API key as HTTP carries it, bare in every format; raises RenderError, never showing it."""
    if not isinstance(value, Mask) and not _BEARER.fullmatch(str(value)):
        raise RenderError(
            "an API key may hold letters, digits and ._~+/- only (RFC 6750): make one with "
            "`openssl rand -hex 32`"
        )
    return Quoted(value)


def key_digest(value: object) -> Quoted:
    """The SHA-256 of an API key in hex, which tells nothing of a key of high entropy."""
    key = bearer(value)
    return key if isinstance(value, Mask) else Quoted(hashlib.sha256(key.encode()).hexdigest())


def nginx_bearer(value: object) -> Quoted:
    """The source of a map entry that matches one key; as a plain string, case would not count."""
    key = bearer(value)
    return Quoted(f'"~^(?i:Bearer) {key if isinstance(value, Mask) else re.escape(key)}$"')


def nginx(value: object) -> Quoted:
    """A quoted string of nginx's configuration, which knows no way to escape a `$`."""
    text = str(value)
    if "$" in text:
        raise RenderError(f"{text!r} holds a $, which nginx would read as a variable")
    if _CONTROL.search(text):
        raise RenderError(f"{text!r} holds a control character, which nginx cannot be given")
    return Quoted('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')


def json_value(value: object) -> Quoted:
    """Any JSON value on one line."""
    return Quoted(json.dumps(value, sort_keys=True, allow_nan=False))


def json_lines(value: object) -> Quoted:
    """Any JSON value over many lines, in its own order, so that people can read a diff."""
    return Quoted(json.dumps(value, indent=2, allow_nan=False))


def yaml_scalar(value: object) -> Quoted:
    """A double-quoted YAML string, in ASCII; PyYAML's emitter would take most of a render."""
    return Quoted('"' + _NOT_YAML.sub(_yaml_escape, str(value)) + '"')


def _yaml_escape(found: re.Match[str]) -> str:
    character = found[0]
    return "\\" + character if character in '"\\' else f"\\U{ord(character):08x}"


def compose(value: object) -> Quoted:
    """A YAML string in a compose file, where `$` would be interpolated."""
    return yaml_scalar(str(value).replace("$", "$$"))


FILTERS: dict[str, Callable[..., Any]] = {
    "word": word,
    "unit_argument": unit_argument,
    "unit_command": unit_command,
    "unit_environment": unit_environment,
    "unit_name": unit_name,
    "unit_text": unit_text,
    "environment_file": environment_file,
    "bearer": bearer,
    "key_digest": key_digest,
    "nginx_bearer": nginx_bearer,
    "nginx": nginx,
    "json": json_value,
    "json_lines": json_lines,
    "yaml": yaml_scalar,
    "compose": compose,
}
