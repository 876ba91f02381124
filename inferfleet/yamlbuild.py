"""From composed YAML nodes to data, noting every mistake that parses: keys, tags, numbers."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, cast

from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from inferfleet.errors import Problem
from inferfleet.model import Secret
from inferfleet.yamlparse import BOOL, CORE, FLOAT, INT, MAP, MERGE, NULL, SEQ, STR, inner, place

Keys = Sequence[str | int]

_SECRETS = ("!env", "!file", "!cmd", "!vault")
_OCTAL = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*")  # 010: 8 in YAML 1.1, 10 in YAML 1.2
_constructor = SafeConstructor()


def dotted(keys: Keys) -> str:
    """Keys as a path for people: `hosts.gpu-01.gpus[0]`."""
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).removeprefix(".")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` when one of the known words is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class Builder:
    """Builds data from nodes, and notes what is wrong with which node."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.wrong: dict[tuple[int, str], Node] = {}  # once, however often an alias repeats it

    def note(self, node: Node, message: str) -> None:
        self.wrong[id(node), message] = node

    def build(self, node: Node) -> Any:
        if type(node) is ScalarNode:
            return node.value if node.tag == STR else self.scalar(node)
        return self.mapping(node) if type(node) is MappingNode else self.sequence(node)

    def sequence(self, node: Node) -> list[Any]:
        if node.tag != SEQ:
            self.note(node, _unknown_tag(node.tag))
        return [self.build(entry) for entry in node.value]

    def mapping(self, node: MappingNode) -> dict[str, Any]:
        if node.tag != MAP:
            self.note(node, _unknown_tag(node.tag))
        own: dict[str, Any] = {}
        merges = []
        for key, value in node.value:
            if key.tag == STR and type(key) is ScalarNode:
                own[key.value] = self.build(value)
            elif key.tag == MERGE:
                merges.append(value)
            else:
                own[self.odd_key(key)] = self.build(value)
        if len(own) + len(merges) != len(node.value):
            self.note_duplicates(node)
        return {**self.merged(merges), **own} if merges else own

    def merged(self, values: list[Node]) -> dict[str, Any]:
        together: dict[str, Any] = {}
        for source in reversed([source for value in values for source in sources(value)]):
            if isinstance(source, MappingNode):
                together.update(self.mapping(source))
            else:
                self.note(source, "only a mapping can be merged with <<")
        return together

    def note_duplicates(self, node: MappingNode) -> None:
        first: dict[str, Node] = {}
        for key, _ in node.value:
            name = text_of(key)
            earlier = first.setdefault(name, key)
            if earlier is not key and key.tag != MERGE:
                line, column = place(earlier)
                at = f"{self.shown}:{line}:{column}"
                self.note(key, f"duplicate key, also at {at}; keep one: the last would win")

    def odd_key(self, key: Node) -> str:
        name = text_of(key)
        if not isinstance(key, ScalarNode):
            self.note(key, "a key must be text; quote text that begins with { or [")
        elif key.tag.startswith(CORE):
            meant = _meaning(key, self.scalar(key))
            self.note(key, f'YAML reads the key {name} as {meant}; write it in quotes: "{name}"')
        else:
            self.note(key, f"a key must be text, without the tag {_tag_text(key.tag)}")
        return name

    def scalar(self, node: ScalarNode) -> Any:
        if node.tag == NULL:
            return None
        if node.tag in _SECRETS:
            return self.secret(node)
        if node.tag in (BOOL, INT, FLOAT):
            return self.number(node)
        if node.tag not in (STR, MERGE):
            self.note(node, _unknown_tag(node.tag))
        return node.value

    def number(self, node: ScalarNode) -> bool | int | float | str:
        try:
            value = plain_value(node)
        except (ValueError, KeyError, IndexError):
            self.note(node, f"{_brief(node.value)!r} does not fit the tag {_tag_text(node.tag)}")
            return str(node.value)
        if not math.isfinite(value) or not -(2**63) <= value < 2**64:
            self.note(node, f"{_brief(node.value)} is out of range; if it is text, quote it")
            return str(node.value)
        if node.tag == INT and not node.style and _OCTAL.fullmatch(node.value):
            self.note(node, _two_readings(node.value, value))
        return value

    def secret(self, node: ScalarNode) -> Secret:
        wrong = _wrong_reference(node.tag, node.value)
        if wrong:
            self.note(node, wrong)
        return Secret(cast(Literal["env", "file", "cmd", "vault"], node.tag[1:]), node.value)

    def find_hidden(self, root: Node, text: str) -> None:
        """Notes traps that parse without a word, only if the text has a sign of one."""
        tabs = re.search(r"^ *\t", text, re.M) is not None
        if not tabs and not re.search(r"\\(0|x00|u0000|U00000000|u[dD][89A-Fa-f])", text):
            return
        lines = text.split("\n") if tabs else []
        for node in _all(root):
            bad = re.search("[\0\ud800-\udfff]", node.value) if type(node) is ScalarNode else None
            if bad:
                self.note(node, f"holds U+{ord(bad[0]):04X}, which no file or command can take")
            if _swallows_tab(node, lines):
                self.note(node, "goes on in a line indented with a tab; YAML takes spaces only")

    def problems(self, root: Node) -> list[Problem]:
        """What was noted, each with the place and path of its node, in file order."""
        if not self.wrong:
            return []
        paths = _paths(root)
        return sorted(
            Problem(self.shown, *place(node), dotted(paths.get(id(node), ())), message)
            for (_, message), node in self.wrong.items()
        )


def _meaning(node: ScalarNode, value: object) -> str:
    kinds = {NULL: "null", BOOL: f"the boolean {str(value).lower()}"}
    return kinds.get(node.tag, f"the number {value}")


def _brief(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:36]}... ({len(text)} characters)"


def _two_readings(text: str, octal: float) -> str:
    decimal = int(text.replace("_", ""))
    said = f"{text} is {octal} in YAML 1.1 (octal) and {decimal} in YAML 1.2: write "
    return said + f'{decimal} or {octal} as meant, or "{text}" if it is text'


def plain_value(node: ScalarNode) -> bool | int | float:
    """A scalar's boolean or number. Raises ValueError, KeyError or IndexError if it has none."""
    if node.tag == BOOL:
        return bool(_constructor.bool_values[node.value.lower()])
    if len(node.value) > 100:  # longer ones take quadratic time
        return math.inf
    make = _constructor.construct_yaml_int if node.tag == INT else _constructor.construct_yaml_float
    return make(node)


def _wrong_reference(tag: str, text: str) -> str:
    if tag == "!vault":
        good = text.lstrip().startswith("$ANSIBLE_VAULT;")
        return "" if good else "!vault takes what ansible-vault encrypt_string prints, after |"
    if tag == "!env":
        good = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is not None
        return "" if good else "!env takes the name of one environment variable"
    if not text.strip():
        return f"{tag} takes a {'path' if tag == '!file' else 'command'}"
    try:
        return "" if tag == "!file" or shlex.split(text) else "!cmd takes a command"
    except ValueError as error:
        return f"!cmd: {str(error).lower()}"


def _unknown_tag(tag: str) -> str:
    shown = _tag_text(tag)
    if tag in _SECRETS:
        return f"{shown} takes one plain value, not a list or mapping"
    return f"unknown tag {shown}; known are {', '.join(_SECRETS)}{did_you_mean(shown, _SECRETS)}"


def _tag_text(tag: str) -> str:
    return "!!" + tag.removeprefix(CORE) if tag.startswith(CORE) else tag


def text_of(key: Node) -> str:
    return key.value if isinstance(key, ScalarNode) else "?"


def sources(value: Node) -> list[Node]:
    """The mappings that a merge key names: one, or a list of them."""
    return value.value if isinstance(value, SequenceNode) else [value]


def _swallows_tab(node: Node, lines: list[str]) -> bool:
    if not lines or not isinstance(node, ScalarNode) or node.style:
        return False
    last = node.end_mark.line + (1 if node.end_mark.column else 0)
    return any(re.match(r" *\t", line) for line in lines[node.start_mark.line + 1 : last])


def _all(root: Node) -> Iterator[Node]:
    """Every node once, however often aliases repeat it."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            waiting.extend(inner(node))
            yield node


def _paths(root: Node) -> dict[int, tuple[str | int, ...]]:
    """Node id -> its keys; a key has the path of its value."""
    paths: dict[int, tuple[str | int, ...]] = {id(root): ()}
    for node in _all(root):
        for step, parts in _steps(node):
            for part in parts:
                paths.setdefault(id(part), (*paths[id(node)], step))
    return paths


def _steps(node: Node) -> Iterator[tuple[str | int, Iterable[Node]]]:
    if isinstance(node, MappingNode):
        yield from ((text_of(key), (key, value)) for key, value in node.value)
    elif isinstance(node, SequenceNode):
        yield from ((index, (entry,)) for index, entry in enumerate(node.value))
