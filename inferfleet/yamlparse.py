"""From a path to composed YAML nodes: read, decoded, parsed, and bounded in size and depth.

What a file can do wrong on that way ends in `UnreadableError`.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

try:
    from yaml import CSafeLoader as _Parser
except ImportError:  # PyYAML built without libyaml: the same answers, ten times slower
    from yaml import SafeLoader as _Parser  # type: ignore[assignment]

MAX_BYTES = 32 * 2**20
MAX_DEPTH = 100  # libyaml composes recursively in C: 100,000 brackets overflow its stack
MAX_VALUES = 4_000_000  # a composed value takes about 500 bytes
MAX_ALIASED = 1_000_000  # values that aliases may add to those written out

CORE = "tag:yaml.org,2002:"
STR, NULL, MERGE = CORE + "str", CORE + "null", CORE + "merge"
MAP, SEQ = CORE + "map", CORE + "seq"
BOOL, INT, FLOAT = CORE + "bool", CORE + "int", CORE + "float"
_UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
_REMEDIES = (
    (
        "mapping values are not allowed",
        'quote a value that contains ": ", or check the indentation',
    ),
    ("could not find expected ':'", 'a key ends with ":"; quote text that is not one'),
    ("cannot start any token", "quote text that begins with this character"),
    ("undefined alias", "quote text that begins with *"),
    ("did not find expected alphabetic", "quote text that begins with *, & or !"),
    ("<block end>", "keys of one mapping begin in the same column"),
    ("expected key", "keys of one mapping begin in the same column"),
    ("unexpected end of stream", "a quote is not closed"),
    ("unknown escape character", "write a backslash in single quotes, or double it"),
    ("another document", "keep one document in a file: split it at ---"),
    ("',' or ']'", "a [ is not closed, or a comma is missing"),
    ("',' or '}'", "a { is not closed, or a comma is missing"),
)


class UnreadableError(Exception):
    """Ends the reading of a file: where (1-based, 0 for nowhere) and what."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        self.message, self.line, self.column = message, line, column
        super().__init__(message)


class _Loader(_Parser):
    """Composes; dates and base-60 numbers stay text, nesting and size are bounded."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0
        self.tags: dict[str, str] = {}

    def descend_resolver(self, parent: Node | None, index: object) -> None:  # noqa: ARG002
        self.depth += 1
        self.values += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError(f"is nested deeper than {MAX_DEPTH} levels", *place(parent))
        if self.values > MAX_VALUES:
            raise UnreadableError(
                f"holds more than {MAX_VALUES:,} values; split the file", *place(parent)
            )

    def ascend_resolver(self) -> None:
        self.depth -= 1

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        if kind is not ScalarNode:
            return MAP if kind is MappingNode else SEQ
        if not implicit[0]:
            return STR
        tag = self.tags.get(value)
        if tag is None:
            tag = self.tags[value] = self._plain(value)
        return tag

    def _plain(self, value: str) -> str:
        forms = self.yaml_implicit_resolvers.get(value[:1], ())
        tag = next((tag for tag, form in forms if form.match(value)), STR)
        return STR if ":" in value and tag in (INT, FLOAT) else tag


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (CORE + "timestamp", CORE + "value")]
    for first, forms in _Parser.yaml_implicit_resolvers.items()
}


# From a path to text


def read(path: Path) -> str:
    """A regular file's text, UTF-8 with or without BOM. Raises UnreadableError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableError(
                "is a folder, not a file" if path.is_dir() else "is not a regular file"
            )
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableError(_unreadable(path, error)) from error
    if len(content) > MAX_BYTES:
        raise UnreadableError(
            f"is larger than {MAX_BYTES // 2**20} MiB; split it into several files"
        )
    return _checked(_decoded(content))


def _unreadable(path: Path, error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"is a symbolic link to {path.readlink()}, which does not exist"
    if isinstance(error, PermissionError):
        return f"cannot be read: {reason}; check its mode and owner, and its folder's"
    return f"cannot be read: {reason}"


def _decoded(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
        raise UnreadableError("is UTF-16 or UTF-32; save it as UTF-8", 1, 1)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + len(content) - len(error.object)  # a BOM is cut off before decoding
        line = content.count(b"\n", 0, start) + 1
        before = content[content.rfind(b"\n", 0, start) + 1 : start].decode("utf-8-sig")
        message = f"byte 0x{content[start]:02x} at offset {start} is not UTF-8; save it as UTF-8"
        raise UnreadableError(message, line, len(before) + 1) from error


def _checked(text: str) -> str:
    found = _UNPRINTABLE.search(text)
    if found:
        name = f"U+{ord(found[0]):04X}"
        raise UnreadableError(
            f"the control character {name} is not allowed; remove it", *_at(text, found)
        )
    conflict = re.search("^<{7} ", text, re.M) if "<<<<<<< " in text else None
    if conflict:
        raise UnreadableError("an unresolved merge conflict begins here", *_at(text, conflict))
    return text


def _at(text: str, found: re.Match[str]) -> tuple[int, int]:
    start = found.start()
    return text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)


# From text to composed nodes


def compose(text: str) -> Node | None:
    """The document's root, None when empty. Raises UnreadableError."""
    loader = _Loader(text)
    try:
        root: Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _syntax(text, error) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UnreadableError(f"is not YAML: {error}") from error
    finally:
        loader.dispose()
    if root is not None and "*" in text:
        _bound_aliases(root)
    return root


def _syntax(text: str, error: yaml.MarkedYAMLError) -> UnreadableError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    lines = text.split("\n")
    written = lines[line - 1] if 0 < line <= len(lines) else ""
    if re.match(r" *\t", written):
        return UnreadableError(
            "a tab in the indentation; YAML takes spaces only", line, written.find("\t") + 1
        )
    said = (error.problem or error.context or "not YAML").removeprefix("but ")
    if "cannot start" in said:
        said = f"found character {written[column - 1 : column]!r} that cannot start any token"
    remedy = next((hint for part, hint in _REMEDIES if part in said), "")
    if error.context and error.context_mark and error.context_mark.line + 1 != line:
        said += f" ({error.context} at line {error.context_mark.line + 1})"
    return UnreadableError(f"{said}; {remedy}" if remedy else said, line, column)


def _bound_aliases(root: Node) -> None:
    """Refuses aliases that refer to themselves, nest too deep or add too many values.

    Recursion stays as shallow as the text: an alias comes after what it refers to.
    """
    sizes: dict[int, tuple[int, int]] = {}  # id -> values and levels when written out; 0: open

    def measure(node: Node) -> tuple[int, int]:
        known = sizes.get(id(node))
        if known == (0, 0):
            raise UnreadableError("an alias inside what it refers to has no end", *place(node))
        if known is None:
            sizes[id(node)] = (0, 0)
            parts = [measure(part) for part in inner(node)]
            known = 1 + sum(size for size, _ in parts), 1 + max((d for _, d in parts), default=0)
            if known[0] > len(sizes) + MAX_ALIASED:
                raise UnreadableError(
                    f"aliases add more than {MAX_ALIASED:,} values here", *place(node)
                )
            if known[1] > MAX_DEPTH:
                raise UnreadableError(
                    f"aliases nest deeper than {MAX_DEPTH} levels here", *place(node)
                )
            sizes[id(node)] = known
        return known

    measure(root)


def inner(node: Node) -> Iterable[Node]:
    """The nodes directly inside one: keys and values, or entries."""
    if isinstance(node, MappingNode):
        return (part for pair in node.value for part in pair)
    return node.value if isinstance(node, SequenceNode) else ()


def place(node: Node | None) -> tuple[int, int]:
    """Line and column where a node begins, from 1; (0, 0) for no node."""
    return (node.start_mark.line + 1, node.start_mark.column + 1) if node else (0, 0)
