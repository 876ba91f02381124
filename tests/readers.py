"""What programs make of rendered files: readers of each format, and the programs themselves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "s": " "}
_NUMBER = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})")


def unit(text: str) -> dict[str, list[tuple[str, str]]]:
    """A systemd unit: sections with their `key = value` lines, continuations joined.

    As conf-parser.c reads it: a comment inside a continued line is left out, a backslash at the
    end of a line is a space.
    """
    sections: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    pending = ""
    for line in re.split(r"[\n\r\0]", text):
        stripped = line.lstrip(" \t")
        if stripped[:1] in ("#", ";") or (not pending and not stripped):
            continue
        joined = pending + line
        slashes = len(joined) - len(joined.rstrip("\\"))
        if slashes % 2:
            pending = joined[:-1] + " "
            continue
        pending = ""
        entry = joined.strip(" \t")
        if entry.startswith("["):
            current = sections.setdefault(entry.strip("[]"), [])
        else:
            key, equals, value = entry.partition("=")
            assert equals, f"systemd would not take the line {entry!r}"
            current.append((key.strip(), value.strip(" \t")))
    assert not pending
    return sections


def words(line: str) -> list[str]:
    """Words of a line: quotes, C escapes and specifiers undone (extract-word.c, specifier.c)."""
    found: list[str] = []
    word: str | None = None
    quote, at = "", 0
    while at < len(line):
        character = line[at]
        at += 1
        if character == "\\":
            value, at = _unescape(line, at)
            word = (word or "") + value
        elif quote:
            word = (word or "") + ("" if character == quote else character)
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote, word = character, word or ""
        elif character in " \t\n\r":
            found += [] if word is None else [word]
            word = None
        else:
            assert word or character != ";", "a second command begins"
            word = (word or "") + character
    assert not quote, f"a quote is not closed: {line!r}"
    found += [] if word is None else [word]
    return [_specifiers(each) for each in found]


def _unescape(line: str, at: int) -> tuple[str, int]:
    character = line[at]
    if character in _ESCAPES:
        return _ESCAPES[character], at + 1
    if character in "\\\"'":
        return character, at + 1
    number = _NUMBER.match(line, at)
    assert number, f"systemd knows no escape \\{character}"
    digits = number[1] or number[2] or number[3]
    return chr(int(digits, 16) if digits else int(number[4], 8)), number.end()


def _specifiers(word: str) -> str:
    left = word.replace("%%", "")
    assert "%" not in left, f"systemd would expand a specifier in {word!r}"
    return word.replace("%%", "%")


def command(line: str) -> list[str]:
    """The argv of an `ExecStart=` line, `$$` undone; no variable may be left to expand."""
    argv = words(line)
    for word in argv:
        assert "$" not in word.replace("$$", ""), f"systemd would expand a variable in {word!r}"
    return [word.replace("$$", "$") for word in argv]


def environment(lines: list[str]) -> dict[str, str]:
    """The variables of `Environment=` lines."""
    pairs = [word.partition("=") for line in lines for word in words(line)]
    return {name: value for name, _, value in pairs}


def environment_file(text: str) -> dict[str, str]:
    """The variables of an `EnvironmentFile=` (env-file.c), of lines NAME="value" alone."""
    found = {}
    for line in text.split("\n"):
        if not line or line.startswith(("#", ";")):
            continue
        match = re.fullmatch(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"', line)
        assert match, f"not one quoted value: {line!r}"
        found[match[1]] = re.sub(r'\\(["\\`$])', r"\1", match[2])
    return found


def compose_text(value: str) -> str:
    """A string of a compose file after interpolation; no variable may be left to expand."""
    assert "$" not in value.replace("$$", ""), f"compose would expand a variable in {value!r}"
    return value.replace("$$", "$")


def nginx_text(value: str) -> str:
    """What nginx makes of crossplane's argument, which undoes escapes of quotes alone."""
    return value.replace("\\\\", "\\")


# the programs


def missing(reason: str) -> None:
    """Skip where a program cannot be had; fail instead where it is promised."""
    if os.environ.get("CI") or os.environ.get("INFERFLEET_REQUIRE_LAB") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str) -> str:
    """The path of a program of the system."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        missing(f"{name} is not here")
    return str(found)


def compose() -> list[str]:
    """The command line of Docker Compose v2: Docker's plugin, or one that is fetched."""
    docker = shutil.which("docker")
    if (
        docker
        and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0
    ):
        return [docker, "compose"]
    script = Path(__file__).parent / "tools" / "compose"
    fetched = subprocess.run([script], capture_output=True, text=True, timeout=300)
    if fetched.returncode:
        missing(f"no Docker Compose v2: {fetched.stderr.strip()[-300:]}")
    return [fetched.stdout.strip()]


def nginx(configuration: Path) -> str:
    """What `nginx -t` objects to, warnings included; empty when nothing."""
    checked = subprocess.run(
        [
            *(program("nginx"), "-t", "-q", "-c", configuration),
            *("-g", f"pid {configuration.parent}/check.pid;"),
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return checked.stderr or ("" if checked.returncode == 0 else checked.stdout or "failed")
