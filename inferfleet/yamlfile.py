"""Reads one YAML file of an inventory safely, and finds positions in it again when asked.

Everything a file can do wrong becomes a `Problem`; nothing here raises for what a user wrote.
Loading keeps no positions: `Document.position` composes the file once more, if it is asked.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from inferfleet.errors import Problem
from inferfleet.yamlbuild import Builder, Keys, did_you_mean, dotted, plain_value, sources, text_of
from inferfleet.yamlparse import CORE, MERGE, NULL, STR, UnreadableError, compose, place, read

__all__ = ["Document", "did_you_mean", "dotted", "inventory_files", "load"]

_INIT = "`inferfleet init` makes an inventory to start from"


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A file's mapping. Positions are looked up by composing the file once more, and kept."""

    path: Path
    shown: str  # the file's name in problems
    data: dict[str, Any]

    def position(self, keys: Keys, *, key: bool = False) -> tuple[int, int]:
        """Line and column, from 1, of the value at `keys`, or with `key` of its key.

        Of what is not there: where its nearest parent is named. (0, 0) when the file cannot be
        parsed (any more).
        """
        tree = _tree_of(self.path)
        if tree is None:
            return 0, 0
        name, value, depth = tree.walk(keys)
        return place(name if key or depth < len(keys) else value)

    def raw(self, keys: Keys) -> str | None:
        """The scalar at `keys` as it was written, without quotes; None for anything else."""
        scalar = _scalar_at(self.path, keys)
        return None if scalar is None else str(scalar.value)

    def misread(self, keys: Keys) -> str:
        """How YAML read an unquoted scalar: `no` as false, `022` as 18; "" if as it is written."""
        scalar = _scalar_at(self.path, keys)
        if scalar is None or scalar.tag == STR or not scalar.tag.startswith(CORE):
            return ""
        text = str(scalar.value)
        if scalar.tag == NULL:
            return f"YAML reads {f'unquoted {text}' if text else 'an empty value'} as null"
        meant = _meant(scalar)
        if meant in ("", text, text.lower()):
            return ""
        return f'YAML reads unquoted {text} as {meant}; write "{text}" if text is meant'


def load(path: Path, *, shown: str) -> tuple[Document, list[Problem]]:
    """The file's document and all that is wrong with it; `shown` names the file in problems.

    An empty file is `{}`, and so is one that cannot be parsed. Where only a part is wrong, the
    rest is returned as well as can be, so that a caller may go on and find more. What aliases
    and merge keys repeat is built anew each time: no two places share a list or mapping.
    """
    with _uncollected():
        try:
            text = read(path)
            root = compose(text)
        except UnreadableError as error:
            wrong = Problem(shown, error.line, error.column, "", error.message)
            return Document(path, shown, {}), [wrong]
        data, problems = _built(root, text, shown)
        return Document(path, shown, data), problems


def _built(root: Node | None, text: str, shown: str) -> tuple[dict[str, Any], list[Problem]]:
    if root is None or (root.tag == NULL and not root.value):
        return {}, []
    if not isinstance(root, MappingNode):
        return {}, [Problem(shown, *place(root), "", "a file must be a mapping (key: value)")]
    builder = Builder(shown)
    data = builder.mapping(root)
    builder.find_hidden(root, text)
    return data, builder.problems(root)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Garbage collection off: composing makes many objects and no garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _meant(scalar: ScalarNode) -> str:
    try:
        return str(plain_value(scalar)).lower()
    except (ValueError, KeyError, IndexError):
        return ""


class _Tree:
    """A composed file, with an index of every mapping that was walked through."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self.indexes: dict[int, Mapping[str | int, tuple[Node, Node]]] = {}

    def walk(self, keys: Keys) -> tuple[Node, Node, int]:
        """Where the walk along `keys` ends: the key's node, the value's, and how far it came."""
        name = value = self.root
        for depth, key in enumerate(keys):
            inside = self.inside(value)
            if key not in inside:
                return name, value, depth
            name, value = inside[key]
        return name, value, len(keys)

    def inside(self, node: Node) -> Mapping[str | int, tuple[Node, Node]]:
        if id(node) not in self.indexes:
            self.indexes[id(node)] = dict(_entries(node))
        return self.indexes[id(node)]


def _entries(node: Node) -> Iterator[tuple[str | int, tuple[Node, Node]]]:
    """What a mapping or list holds, what wins last: merged before own."""
    if isinstance(node, SequenceNode):
        yield from ((index, (entry, entry)) for index, entry in enumerate(node.value))
    if isinstance(node, MappingNode):
        merges = [value for key, value in node.value if key.tag == MERGE]
        for source in reversed([source for value in merges for source in sources(value)]):
            yield from _entries(source)
        yield from ((text_of(k), (k, v)) for k, v in node.value if k.tag != MERGE)


def _scalar_at(path: Path, keys: Keys) -> ScalarNode | None:
    tree = _tree_of(path)
    if tree is None:
        return None
    _, value, depth = tree.walk(keys)
    return value if depth == len(keys) and isinstance(value, ScalarNode) else None


def _tree_of(path: Path) -> _Tree | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return _composed(path, (status.st_mtime_ns, status.st_size, status.st_ino))


@lru_cache(maxsize=16)
def _composed(path: Path, stamp: tuple[int, ...]) -> _Tree | None:  # noqa: ARG001
    with _uncollected():
        try:
            root = compose(read(path))
        except UnreadableError:
            return None
    return _Tree(root) if root is not None else None


def inventory_files(folder: Path) -> tuple[list[Path], list[Problem]]:
    """Every *.yml and *.yaml below the folder, sorted, and what could not be looked into.

    Hidden files and folders are left out. A linked folder is followed, each real folder once.
    """
    search = _Search()
    search.visit(folder, frozenset())
    if not search.files and not search.problems:
        search.note(folder, f"holds no *.yml or *.yaml file; {_INIT}")
    return sorted(search.files), sorted(search.problems)


class _Search:
    def __init__(self) -> None:
        self.files: list[Path] = []
        self.problems: list[Problem] = []
        self.seen: set[tuple[int, int]] = set()  # device and inode of each folder

    def note(self, folder: Path, message: str) -> None:
        self.problems.append(Problem(str(folder), 0, 0, "", message))

    def visit(self, folder: Path, above: frozenset[tuple[int, int]]) -> None:
        try:
            status = folder.stat()
            identity = status.st_dev, status.st_ino
            if identity in above:
                self.note(folder, "is a symbolic link to a folder that holds it; remove it")
            if identity in self.seen:
                return
            self.seen.add(identity)
            below = list(self.folders(folder))
        except OSError as error:
            self.note(folder, _no_folder(error))
            return
        for inside in below:
            self.visit(inside, above | {identity})

    def folders(self, folder: Path) -> Iterator[Path]:
        """The folders inside, real ones before linked ones; files are collected."""
        for entry in sorted(folder.iterdir(), key=lambda entry: (entry.is_symlink(), entry)):
            if entry.name.startswith("."):
                continue
            if entry.suffix.lower() in (".yml", ".yaml"):
                self.files.append(entry)
            elif entry.is_dir():
                yield entry


def _no_folder(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no such folder; {_INIT}"
    if isinstance(error, NotADirectoryError):
        return "is a file; name its folder"
    return f"cannot be read: {(error.strerror or str(error)).lower()}"
