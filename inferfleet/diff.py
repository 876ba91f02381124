"""What a bundle would change on a host that is as a snapshot says. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping

from inferfleet.model import Artefact, Bundle, Change, Diff, FileState, Snapshot, sh

UNITS = "/etc/systemd/system/"
MASK = b"<secret "


def diff(bundle: Bundle, snapshot: Snapshot) -> Diff:
    """Every difference, in the order it would be made; empty when the host is as wanted."""
    files = [change for a in bundle.artefacts if (change := _file(a, snapshot.files))]
    removals = list(_removals(bundle, snapshot))
    ensures = [Change("ensure", bundle.ensures[i].title) for i in sorted(snapshot.failing)]
    changed = {change.subject for change in files}
    restarts, reloads = _units(a for a in bundle.artefacts if a.path in changed)
    stops = tuple(u for change in removals for u in change.units)
    owed = [unit for unit in snapshot.owed if unit not in (*restarts, *reloads)]
    pays = [Change("pay", unit, "promised by a run that did not finish") for unit in owed]
    if snapshot.interrupted:
        pays.insert(0, Change("pay", "an interrupted run", "is finished or undone first"))
    moved = snapshot.phase if snapshot.owned and snapshot.phase != bundle.phase else ""
    changes = (*pays, *files, *removals, *ensures)
    if moved and not changes:
        changes = (Change("move", f"phase {bundle.phase}", f"moves from {moved}"),)
    return Diff(
        host=snapshot.host,
        changes=changes,
        restarts=restarts,
        reloads=reloads,
        stops=stops,
        moves_from=moved,
        unknown=tuple(a.path for a in bundle.artefacts if _unresolved(a)),
        refused=tuple(_refusals(bundle, snapshot)),
    )


def _refusals(bundle: Bundle, snapshot: Snapshot) -> Iterator[str]:
    """What may hold somebody's data, and is never replaced."""
    for path in (artefact.path for artefact in bundle.artefacts):
        if path in snapshot.files and snapshot.files[path].kind == "directory":
            away = sh("mv", path, f"{path}.old")
            yield f"{path} is a directory, and a file is wanted there: move it away ({away})"


def _unresolved(artefact: Artefact) -> bool:
    return artefact.secret and MASK in artefact.content


def _file(wanted: Artefact, files: Mapping[str, FileState]) -> Change | None:
    state = files.get(wanted.path, FileState(wanted.path))
    units = (*wanted.restarts, *wanted.reloads)
    if state.kind == "absent":
        return Change("create", wanted.path, units=units)
    details = list(_details(wanted, state))
    return Change("update", wanted.path, ", ".join(details), units) if details else None


def _details(wanted: Artefact, state: FileState) -> Iterator[str]:
    if state.kind == "directory":
        yield "a directory is there: refused"
    elif state.kind != "file":
        yield f"replaces a {state.kind}"
    elif not state.digest:
        yield "content unknown: it cannot be read without root's rights"
    elif state.digest != wanted.digest and not _unresolved(wanted):
        yield "content"
    if state.kind == "file" and state.mode != wanted.mode:
        yield f"mode {state.mode:04o} -> {wanted.mode:04o}"
    for what, is_, should in (
        ("owner", state.owner, wanted.owner),
        ("group", state.group, wanted.group),
    ):
        if is_ and state.kind == "file" and is_ != should:
            yield f"{what} {is_} -> {should}"


def _removals(bundle: Bundle, snapshot: Snapshot) -> Iterator[Change]:
    wanted = {artefact.path for artefact in bundle.artefacts}
    for path in sorted(set(snapshot.owned) - wanted):
        name = path.removeprefix(UNITS)
        is_unit = path.startswith(UNITS) and "/" not in name and "@." not in name
        yield Change("remove", path, units=(name,) if is_unit else ())


def _units(changed: Iterable[Artefact]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    artefacts = list(changed)
    restarts = dict.fromkeys(unit for a in artefacts for unit in a.restarts)
    reloads = dict.fromkeys(u for a in artefacts for u in a.reloads if u not in restarts)
    return tuple(restarts), tuple(reloads)


def unified(artefact: Artefact, before: bytes | None) -> list[str]:
    """The lines of a unified diff from what the host has to what is wanted; secrets are not shown.

    `before` is None where the host has no such file.
    """
    if artefact.secret:
        return [f"--- {artefact.path}", f"+++ {artefact.path}", "  (holds secrets: not shown)"]
    old, new = (_lines(content) for content in (before or b"", artefact.content))
    source = artefact.path if before is not None else "/dev/null"
    return list(difflib.unified_diff(old, new, source, artefact.path, lineterm=""))


def _lines(content: bytes) -> list[str]:
    """Lines fit for a terminal: nothing a file holds can move the cursor or change colours."""
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        return [f"(binary, {len(content)} bytes)"]
    return ["".join(c if c.isprintable() or c == "\t" else "�" for c in line) for line in lines]
