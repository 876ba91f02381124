"""Rewrites vllm.json from the parsers of vLLM's released packages.

    python -m inferfleet.flags.build

Reads a few source files of each wheel by HTTP ranges (about a megabyte of 300), from the index that
this machine's pip uses, and nothing of them is run: flags are literals in `add_argument` calls,
or fields of dataclasses, whose annotations say what values they take.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from pip._internal.commands import create_command
from pip._internal.network.lazy_wheel import LazyZipOverHTTP

TABLE = Path(__file__).with_name("vllm.json")
OLDEST = (0, 8)
WHEEL = re.compile(r"vllm-([\d.]+)-cp38-abi3-manylinux\w+x86_64\.whl")
LINK = re.compile(r'<a href="([^"#]+)[^>]*>([^<]+)</a>')
PARSERS = re.compile(r"vllm/(engine/arg_utils|entrypoints/((\w+/)?cli_args|cli/serve))\.py")
SOURCES = re.compile(
    rf"{PARSERS.pattern}|vllm/(envs|config|config/.*|entrypoints/constants|utils/argparse_utils)\.py"
)
LISTS = {"list", "List", "tuple", "Tuple", "set", "Sequence"}


@dataclass
class Sources:
    """The syntax trees of one release, by path, and what their names stand for."""

    trees: dict[str, ast.Module]
    aliases: dict[str, ast.expr] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tree in self.trees.values():
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    self.classes.setdefault(node.name, node)
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self.aliases.setdefault(node.targets[0].id, node.value)
                elif isinstance(node, ast.AnnAssign) and node.value is not None:
                    self.aliases.setdefault(ast.unparse(node.target), node.value)

    def parsers(self) -> Iterator[ast.Module]:
        return (tree for path, tree in self.trees.items() if PARSERS.fullmatch(path))

    def annotation(self, owner: str, name: str) -> ast.expr | None:
        """The annotation of a class's field, its own or inherited."""
        found = self.classes.get(owner)
        if found is None:
            return None
        for node in found.body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
                return node.annotation
        bases = (base.id for base in found.bases if isinstance(base, ast.Name))
        return next((a for base in bases if (a := self.annotation(base, name))), None)

    def atoms(self, node: ast.expr | None) -> Iterator[Any]:
        """What an annotation allows: names of types, and the values of `Literal`s as ("=", v)."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from self.atoms(ast.parse(node.value, mode="eval").body)
        elif isinstance(node, ast.Constant):
            yield str(node.value)
        elif isinstance(node, ast.BinOp):
            yield from self.atoms(node.left)
            yield from self.atoms(node.right)
        elif isinstance(node, ast.Subscript):
            yield from self._subscript(node)
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in self.aliases and name not in self.classes:
                yield from self.atoms(self.aliases[name])
            else:
                yield name

    def _subscript(self, node: ast.Subscript) -> Iterator[Any]:
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            for value in inner:
                if isinstance(value, ast.Constant):
                    yield ("=", str(value.value))
                else:
                    yield from self.atoms(value)
        elif name in ("Union", "Optional", "Annotated", "SkipValidation"):
            for part in inner[: 1 if name == "Annotated" else None]:
                yield from self.atoms(part)
        else:
            yield name
            if name in LISTS:
                yield from (atom for part in inner for atom in self.atoms(part) if atom[0] == "=")


Flag = tuple[str, tuple[str, ...]]  # kind, and the values it is limited to


def kind_of(sources: Sources, annotation: ast.expr | None) -> Flag:
    """How vLLM's own get_kwargs() turns a field's type into an option."""
    atoms = set(sources.atoms(annotation)) - {"None"}
    literals = tuple(sorted(atom[1] for atom in atoms if isinstance(atom, tuple)))
    if atoms == {"bool", "str"}:
        return "maybe", ()
    if "bool" in atoms:
        return "toggle", ()
    if atoms & LISTS:
        return "list", () if "str" in atoms else literals
    return "value", () if "str" in atoms else literals


def call_kind(sources: Sources, call: ast.Call, kwargs: dict[str, str]) -> Flag:
    """The kind of one `add_argument` call; `kwargs` maps its variables to config classes."""
    given: dict[str, Any] = {k.arg: k.value for k in call.keywords if k.arg}
    kind: Flag = ("value", ())
    for keyword in call.keywords:
        for found in ast.walk(keyword.value) if keyword.arg is None else ():
            if isinstance(found, ast.Subscript) and ast.unparse(found.value) in kwargs:
                owner, key = kwargs[ast.unparse(found.value)], ast.literal_eval(found.slice)
                kind = kind_of(sources, sources.annotation(owner, key))
    action = ast.unparse(given["action"]).strip("'\"") if "action" in given else ""
    if action in ("store_true", "store_false", "StoreBooleanAction", "help", "version"):
        return "switch", ()
    if action.endswith("BooleanOptionalAction"):
        return "toggle", ()
    nargs = ast.unparse(given["nargs"]).strip("'\"") if "nargs" in given else ""
    if nargs:
        return {"?": "maybe"}.get(nargs, "list"), kind[1]
    if isinstance(choices := given.get("choices"), ast.List | ast.Tuple):
        if all(isinstance(c, ast.Constant) for c in choices.elts):
            kind = (kind[0], tuple(sorted(str(c.value) for c in choices.elts)))  # type: ignore[attr-defined]
        else:
            kind = (kind[0], ())
    return kind


def flags(sources: Sources) -> dict[str, Flag]:
    """Every option of `vllm serve`: as written with its dashes -> its kind."""
    found: dict[str, Flag] = {"-h": ("switch", ()), "--help": ("switch", ())}
    for tree in sources.parsers():
        kwargs = dict(_kwargs(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _called(node) == "add_argument":
                kind = call_kind(sources, node, kwargs)
                found |= {name: kind for name in _literals(node.args) if name.startswith("-")}
            elif isinstance(node, ast.ClassDef) and node.name in (
                "FrontendArgs",
                "BaseFrontendArgs",
            ):
                found |= dict(_fields(sources, node))
    if "EnableDisableAction" in sources.classes:
        found |= dict(_inverses(found))
    return found


def _fields(sources: Sources, node: ast.ClassDef) -> Iterator[tuple[str, Flag]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
            name = ast.unparse(line.target)
            kind = _customised(name, kind_of(sources, line.annotation))
            yield "--" + name.replace("_", "-"), kind


def _customised(name: str, kind: Flag) -> Flag:
    """What FrontendArgs changes after get_kwargs(): these take one value each."""
    one = ("allowed_origins", "allowed_methods", "allowed_headers", "middleware")
    return ("value", ()) if name in (*one, "disable_access_log_for_endpoints") else kind


def _inverses(found: dict[str, Flag]) -> Iterator[tuple[str, Flag]]:
    """Since EnableDisableAction, --enable-x has a --disable-x, and the other way round."""
    for name, (kind, _) in found.items():
        for prefix, inverse in (("--enable-", "--disable-"), ("--disable-", "--enable-")):
            other = inverse + name.removeprefix(prefix)
            if kind == "toggle" and name.startswith(prefix) and other not in found:
                yield other, ("switch", ())


def _kwargs(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Variables that hold get_kwargs(SomeConfig): their names and the config's."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        if _called(node.value) == "get_kwargs":
            yield ast.unparse(node.targets[0]), ast.unparse(node.value.args[0])


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)


def _literals(nodes: Iterable[ast.expr]) -> list[str]:
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def variables(sources: Sources) -> set[str]:
    """Names in envs.py's table of environment variables."""
    for node in sources.trees["vllm/envs.py"].body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "environment_variables":
            return set(_literals(getattr(node.value, "keys", [])))  # type: ignore[attr-defined]
    raise ValueError("envs.py has no environment_variables")


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def read(url: str, session: Any) -> Sources:
    """The sources of one wheel, without downloading it."""
    with zipfile.ZipFile(LazyZipOverHTTP(url, session, 256 * 1024)) as wheel:
        names = [name for name in wheel.namelist() if SOURCES.fullmatch(name)]
        return Sources({name: ast.parse(wheel.read(name)) for name in names})


def wheels() -> tuple[dict[str, str], Any]:
    """Versions and addresses in the index, oldest first, and a way to make sessions for it."""
    command: Any = create_command("download")
    options, _ = command.parse_args(["vllm"])
    answer = command._build_session(options).get(options.index_url.rstrip("/") + "/vllm/")
    answer.raise_for_status()
    found = {m[1]: urljoin(answer.url, url) for url, name in LINK.findall(answer.text)
             if (m := WHEEL.fullmatch(name)) and release(m[1]) >= OLDEST}  # fmt: skip
    order = sorted(found, key=release)
    return {v: found[v] for v in order}, lambda: command._build_session(options)


def spans(tables: list[dict[str, Flag]]) -> dict[str, list[list[Any]]]:
    """name -> [[first release, last release, kind, values], ...], by index into `releases`."""
    found: dict[str, list[list[Any]]] = {}
    for index, table in enumerate(tables):
        for name, (kind, values) in table.items():
            own = found.setdefault(name, [])
            last = own[-1] if own else None
            if last and last[1] == index - 1 and last[2:] == [kind, list(values)]:
                last[1] = index
            else:
                own.append([index, index, kind, list(values)])
    return dict(sorted(found.items()))


def written(releases: list[str], table: dict[str, Any], names: dict[str, Any]) -> str:
    """JSON with a flag a line, so that a new release is a diff that can be read."""
    lines = ["{", f' "releases": {json.dumps(releases)},', ' "flags": {']
    lines += _entries({name: [_short(s) for s in own] for name, own in table.items()})
    lines += [
        " },",
        ' "variables": {',
        *_entries({n: [s[:2] for s in o] for n, o in names.items()}),
    ]
    return "\n".join([*lines, " }", "}", ""])


def _short(span: list[Any]) -> list[Any]:
    return span if span[3] else span[:3]


def _entries(table: dict[str, Any]) -> list[str]:
    lines = [f"  {json.dumps(name)}: {json.dumps(own)}" for name, own in table.items()]
    return [line + "," for line in lines[:-1]] + lines[-1:]


def main() -> None:
    found, session = wheels()
    releases = list(found)
    with ThreadPoolExecutor(4) as pool:
        trees = list(pool.map(lambda url: read(url, session()), found.values()))
    table = spans([flags(sources) for sources in trees])
    names = spans([dict.fromkeys(variables(sources), ("", ())) for sources in trees])
    TABLE.write_text(written(releases, table, names), encoding="utf-8")
    print(f"{TABLE}: {len(releases)} releases, {len(table)} flags", file=sys.stderr)


if __name__ == "__main__":
    main()
