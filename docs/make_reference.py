"""Writes docs/reference.md from the schemas and the tasks; a test compares it with what is there.

python docs/make_reference.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from inferfleet.cli import namespace
from inferfleet.roles import Library
from inferfleet.schema import composed

HERE = Path(__file__).parent
HEAD = """\
# Reference

Made from the schemas and the tasks by `docs/make_reference.py`; do not edit.
"""

READING = """\
Files are YAML 1.1, as PyYAML reads it, without what surprises: dates and base-60 numbers
(`22:22`) stay text, a number with a leading zero (`010000`: 4096 in YAML 1.1, 10000 in 1.2) is
refused until it is written as it is meant, and so are duplicate keys and keys that are no text
(`no`, `1`). `yes`, `no`, `on` and `off` are booleans; quote them where text is meant.
"""


@cache  # invoke gives an option's help only once
def text() -> str:
    """The whole page."""
    schema = composed(Library())
    parts = [HEAD, "## Tasks\n", *tasks(), "## Inventory\n", READING, *inventory(schema)]
    for kind, names in (("engine", Library().engines()), ("service", Library().services())):
        for name in names:
            role = Library().role(name)
            where = "a deployment's `options`" if kind == "engine" else "a phase's `roles`"
            parts += [f"## Role {name}\n", f"{role.schema['description']} Set in {where}.\n"]
            parts += table(role.schema, schema)
    return "\n".join(parts).rstrip() + "\n"


def tasks() -> Iterator[str]:
    for name in sorted(namespace.task_names):
        task = namespace[name]
        yield f"### {name}\n\n{inspect.getdoc(task)}\n"
        yield "| option | meaning |\n|---|---|"
        options = [o for o in task.get_arguments() if o.name]
        for option in options:
            flag = f"`--{option.name.replace('_', '-')}`"
            yield f"| {flag} | {option.help or ''} |"
        yield ""


def inventory(schema: Mapping[str, Any]) -> Iterator[str]:
    for section, kind in (
        ("hosts", "host"),
        ("groups", "group"),
        ("models", "model"),
        ("deployments", "deployment"),
        ("phases", "phase"),
    ):
        yield f"### {section}\n\n{schema['properties'][section]['description'].strip()}\n"
        yield from table(schema["$defs"][kind], schema)


def table(described: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """A row per key, nested objects with dots."""
    yield "| key | meaning | default |\n|---|---|---|"
    for key, said, default in rows(described, schema, ""):
        yield f"| `{key}` | {said} | {default} |"
    yield ""


def rows(
    described: Mapping[str, Any], schema: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str, str]]:
    for key, wanted in described.get("properties", {}).items():
        found = resolved(wanted, schema)
        required = " **Required.**" if key in described.get("required", ()) else ""
        choices = (
            f" One of {', '.join(f'`{c}`' for c in found['enum'])}." if "enum" in found else ""
        )
        said = found.get("description", "").strip().rstrip(".")
        default = f"`{found['default']}`" if "default" in found else ""
        yield prefix + key, f"{said}.{choices}{required}".replace("|", "\\|"), default
        if key in ("variables", "roles"):  # the roles' own tables say it
            continue
        inner = resolved(found.get("items", {}), schema)
        nested = f"{prefix}{key}{'[]' if inner else ''}."
        yield from rows(inner or found, schema, nested)


def resolved(wanted: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A property with what it refers to; its own words win."""
    reference = wanted.get("$ref", "").removeprefix("#/$defs/")
    return {**(schema["$defs"][reference] if reference else {}), **wanted}


if __name__ == "__main__":
    (HERE / "reference.md").write_text(text(), encoding="utf-8")
