"""Change a host's entry in the inventory's own text; everything else stays, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from inferfleet import yamlfile, yamlparse
from inferfleet.errors import Error


def defining(folder: Path, host: str) -> Path:
    """The file that defines the host. Raises Error when none does."""
    for path in yamlfile.inventory_files(folder)[0]:
        if _entry(yamlparse.compose(yamlparse.read(path)), host) is not None:
            return path
    raise Error(f"{folder}: no file defines the host '{host}'")


def updated(text: str, host: str, values: Mapping[str, str]) -> str:
    """`text` with these keys of a host set to these values, each one line of YAML.

    Raises Error where the entry is written in a way that cannot be changed safely.
    """
    before = text
    for key, value in values.items():
        entry = _entry(yamlparse.compose(text), host)
        if not isinstance(entry, MappingNode):
            raise Error(f"the entry of '{host}' is not a mapping: paste it by hand")
        text = _set(text, entry, key, value)
    _compare(before, text, host, values)
    return text


def _entry(root: Node | None, host: str) -> Node | None:
    return _child(_child(root, "hosts"), host)


def _child(node: Node | None, key: str) -> Node | None:
    pairs = node.value if isinstance(node, MappingNode) else ()
    return next((value for name, value in pairs if name.value == key), None)


def _set(text: str, entry: MappingNode, key: str, value: str) -> str:
    for name, old in entry.value:
        if name.value == key:
            start, end = _span(text, name, old)
            gap = "" if text[start - 1 : start].isspace() else " "
            return text[:start] + gap + value + text[end:]
    return _added(text, entry, f"{key}: {value}")


def _added(text: str, entry: MappingNode, line: str) -> str:
    """The entry with one more key, in its own style."""
    if entry.flow_style:
        close = _offset(text, entry, end=True) - 1
        body = text[_offset(text, entry) + 1 : close].rstrip()
        at = close - (len(text[:close]) - len(text[:close].rstrip()))
        comma = "" if not body or body.endswith(",") else ","
        return f"{text[:at]}{comma}{' ' if body else ''}{line}{text[at:]}"
    name, last = entry.value[-1]
    at = text.find("\n", _span(text, name, last)[1])
    at = len(text) if at < 0 else at
    return f"{text[:at]}\n{' ' * name.start_mark.column}{line}{text[at:]}"


def _span(text: str, name: Node, value: Node) -> tuple[int, int]:
    """Where a key's value stands, without the comments and blank lines that follow it."""
    after = _offset(text, name, end=True)
    start, end = _offset(text, value), _offset(text, value, end=True)
    if start < after:  # an alias: its node is the anchor's
        found = re.compile(r"\s*:\s*(\*[^\s,}\]]+)").match(text, after)
        if found is None:
            raise Error(f"the value of '{name.value}' cannot be found: change it by hand")
        return found.span(1)
    colon = re.compile(r"\s*:[ \t]*").match(text, after)
    first = colon.end() if colon else start
    if isinstance(value, MappingNode | SequenceNode) and not value.flow_style:
        kept = re.sub(r"(\s*(^|\s)#[^\n]*|\s+)+\Z", "", text[start:end], flags=re.M)
        return first, start + len(kept)
    return min(first, start) if text[first:start].strip() else start, end


def _offset(text: str, node: Node, *, end: bool = False) -> int:
    mark = node.end_mark if end else node.start_mark
    lines = text.split("\n")
    return sum(len(line) + 1 for line in lines[: mark.line]) + mark.column


def _compare(before: str, after: str, host: str, values: Mapping[str, str]) -> None:
    """The two texts say the same, but for these values of this host."""
    try:
        old, new = yamlparse.compose(before), yamlparse.compose(after)
    except yamlparse.UnreadableError as error:
        raise Error(
            f"the entry of '{host}' cannot be changed in place ({error}): paste it by hand"
        ) from error
    unequal = _plain(old, (host, *values)) != _plain(new, (host, *values))
    set_right = all(
        _plain(_child(_entry(new, host), key), ()) == _plain(yamlparse.compose(value), ())
        for key, value in values.items()
    )
    if unequal or not set_right:
        raise Error(f"the entry of '{host}' cannot be changed in place: paste it by hand")


def _plain(node: Node | None, without: tuple[str, ...], path: tuple[str, ...] = ()) -> object:
    """A node's meaning; `without` is a host and the keys of it that are left out."""
    if isinstance(node, MappingNode):
        return [
            (_plain(k, ()), _plain(v, without, (*path, str(k.value))))
            for k, v in node.value
            if not (without and path == ("hosts", without[0]) and k.value in without[1:])
        ]
    if isinstance(node, SequenceNode):
        return [_plain(each, without, (*path, "-")) for each in node.value]
    return (node.tag, node.value) if isinstance(node, ScalarNode) else None
