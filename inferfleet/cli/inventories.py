"""Tasks that touch no host: check, render, schema, init."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context

from inferfleet.cli.command import (
    FINE,
    INVENTORY,
    JSON,
    LIMIT,
    PHASE,
    REHEARSE,
    command,
    warn,
)
from inferfleet.cli.command import project as open_project
from inferfleet.errors import UsageError


@command(inventory=INVENTORY, limit=f"{LIMIT}; here: that there are such", json=JSON)
def check(_: Context, inventory: str = "inventory", limit: str = "", json: bool = False) -> int:
    """Is the inventory right? Everything that is wrong, in one list; no host is touched."""
    from dataclasses import asdict

    from inferfleet import report

    project = open_project(inventory)
    found = project.inventory
    project.limited(found.hosts.values(), limit)
    counts = {
        what: len(getattr(found, what)) for what in ("hosts", "models", "deployments", "phases")
    }
    warn(project, quiet=json)
    if json:
        report.as_json({"ok": True, "problems": [asdict(w) for w in found.warnings], **counts})
    else:
        said = ", ".join(f"{count} {what}" for what, count in counts.items())
        print(f"{inventory}: fine ({said}).")
    return FINE


@command(
    phase=f"{PHASE}; default: all of them",
    inventory=INVENTORY,
    limit=LIMIT,
    output="where to write (default: build/<phase>)",
    rehearse=REHEARSE,
    json="print the index instead of a summary",
)
def render(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    output: str = "",
    rehearse: bool = False,
    json: bool = False,
) -> int:
    """Write what each host would get to build/<phase>/<host>/..., for review; secrets masked."""
    from inferfleet import report, tree

    project = open_project(inventory)
    names = [phase] if phase else list(project.inventory.phases)
    if output and len(names) > 1:
        raise UsageError("--output is for one phase: say which with --phase")
    indexes = {}
    for name in names:
        plan = project.plan(name, rehearse=rehearse)
        folder = Path(output) if output else Path("build") / name
        bundles = project.bundles(plan, project.chosen(plan, limit))
        indexes[name] = tree.write(folder, bundles, plan)
        if not json:
            files = sum(len(host["files"]) for host in indexes[name].values())
            said = f"{report.counted(files, 'file')} for {report.counted(len(bundles), 'host')}"
            print(f"{folder}/: {said}, and {tree.INDEX}")
    if json:
        report.as_json(indexes)
    return FINE


@command(
    output="where to write it (default: inventory/schema.json)",
    inventory=INVENTORY,
    json="to standard output instead of a file",
)
def schema(_: Context, inventory: str = "inventory", output: str = "", json: bool = False) -> int:
    """Publish the inventory's JSON Schema, with every role's options, for editors."""
    from inferfleet.schema import published

    project = open_project(inventory)
    text = published(project.library)
    if json:
        print(text, end="")
        return FINE
    path = Path(output) if output else project.folder / "schema.json"
    path.write_text(text, encoding="utf-8")
    print(f"{path}: written.")
    return FINE


@command(folder="where (default: here)")
def init(_: Context, folder: str = ".") -> int:
    """Make a project folder with an inventory to start from."""
    from inferfleet.start import make

    for path in make(Path(folder)):
        print(path)
    print("Edit inventory/hosts.yml, then: inferfleet check")
    return FINE
