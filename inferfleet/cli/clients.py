"""The task clients: what editors, agents and programs need to reach a phase."""

from __future__ import annotations

import sys
from pathlib import Path

from invoke.context import Context

from inferfleet.cli.command import FINE, INVENTORY, JSON, PHASE, REHEARSE, command, warn
from inferfleet.cli.command import project as open_project


@command(
    phase=PHASE,
    for_="vscode, continue, cline, opencode, openai, huggingface, ollama or curl",
    user="whose key, by the name it has in the inventory; names the variable it is in",
    write="bring this file up to date instead of printing; what it has besides is kept",
    ca="file of the CA that signed the certificate, on the client's machine",
    url="another address than the inventory's, such as https://llm.example.com",
    inventory=INVENTORY,
    rehearse=REHEARSE,
    json=JSON,
)
def clients(
    _: Context,
    phase: str = "",
    for_: str = "",
    user: str = "",
    write: str = "",
    ca: str = "",
    url: str = "",
    inventory: str = "inventory",
    rehearse: bool = False,
    json: bool = False,
) -> int:
    """The configuration of a client for a phase; from the inventory alone, without any key."""
    from inferfleet import clients as known
    from inferfleet import report
    from inferfleet.clients import discovery, writing

    project = open_project(inventory)
    plan = project.plan(phase, rehearse=rehearse)
    access = discovery.access(plan, project.library, discovery.Wanted(user, url, ca))
    made = known.configuration(for_, access)
    warn(project, quiet=json)
    if json:
        done = writing.write(Path(write), made) if write else ""
        report.as_json(
            {
                "ok": True,
                "client": for_,
                "content": made.text,
                "place": made.place,
                "notes": made.notes,
                "variable": access.key,
                **({"written": done} if write else {}),
            }
        )
        return FINE
    _show(made.text, made.place, made.notes, write)
    if write:
        print(f"{write}: {writing.write(Path(write), made)}.")
    return FINE


def _show(text: str, place: str, notes: tuple[str, ...], write: str) -> None:
    """The text to standard output, so that it can be piped; what to know beside it elsewhere."""
    if not write:
        print(text, end="")
        print(f"for: {place}", file=sys.stderr)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
