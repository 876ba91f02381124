"""One request carried out."""

from __future__ import annotations

import grp
import hashlib
import json
import os
import pwd
import signal
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from inferfleet.applier.commands import RELOAD, act, check, emit, ensured
from inferfleet.applier.disk import Disk, Failed
from inferfleet.applier.guard import Guard
from inferfleet.applier.manifest import UNITS, generation, named, same, stops
from inferfleet.applier.transaction import State, Transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Json = dict[str, Any]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UNTOUCHED = "no file was changed"
LATER = "the next run goes on from there"


class Apply:
    """One request carried out."""

    def __init__(self, request: Json, disk: Disk, runs: bool) -> None:
        self.request, self.disk, self.runs = request, disk, runs
        self.state = State(disk)
        self.transaction = Transaction(disk, self.state, runs)
        self.guard = Guard(disk)
        self.parts: list[Json] = request["parts"]
        self.files: dict[str, Json] = {f["path"]: f for p in self.parts for f in p["files"]}
        self.parents = {str(p) for path in self.files for p in Path(path).parents}
        self.changes = self.restarts = 0
        self.outlook = UNTOUCHED

    def carry_out(self, stream: BinaryIO) -> None:
        """All of it; Failed or OSError when a step fails. Up to the commit, all is then undone."""
        self.state.lock(self.request["owner"], self.request["reason"])
        # before anything of ours (a package, a recovery) may change these files
        self.check_expected()
        self.outlook = LATER
        if self.runs and self.transaction.committed():
            self.guard.ready()  # to finish may be to stop units, which reloads all others
        self.transaction.recover()
        self.outlook = UNTOUCHED
        try:
            self.store(stream)
            for part in self.parts:
                self.ensure_all(part, before=True)
            staged = self.stage()
        except (Failed, OSError):
            self.transaction.undo()
            self.state.sweep()
            raise
        self.outlook = LATER
        if staged:
            self.transaction.finish()
        else:
            self.transaction.undo()
        self.state.sweep()
        self.activate_guarded()
        self.state.unlock()

    def check_expected(self) -> None:
        found = {path: self.disk.content(self.disk.at(path)) for path in self.request["expect"]}
        changed = [path for path, was in self.request["expect"].items() if found[path] != was]
        if changed:
            raise Failed(f"{', '.join(changed)}: changed since the plan was made; plan again")
        if self.state.manifest()["generation"] != self.request["generation"]:
            raise Failed("another run was here since the plan was made; plan again")

    # contents

    def store(self, stream: BinaryIO) -> None:
        """Have every wanted content among the blobs: sent, kept, or from the file itself."""
        for directory in (self.state.blobs, self.state.generations, self.transaction.home):
            self.disk.make(directory, 0o700)
        for digest, size in self.request["blobs"]:
            content = stream.read(size)
            if hashlib.sha256(content).hexdigest() != digest:
                raise Failed("the connection ended before everything was sent")
            self.keep(digest, content)
        for path, file in self.files.items():
            if not (self.state.blobs / file["sha256"]).exists():
                self.keep(file["sha256"], self.disk.at(path).read_bytes())

    def keep(self, digest: str, content: bytes) -> None:
        blob = self.state.blobs / digest
        if not blob.exists():
            self.disk.write(blob.with_suffix(".part"), content)
            self.disk.move(blob.with_suffix(".part"), blob)

    def blob(self, file: Json) -> bytes:
        return self.state.blobs.joinpath(file["sha256"]).read_bytes()

    # files

    def stage(self) -> bool:
        """Prepare the transaction; False when files and manifest are as they should be."""
        old = self.state.manifest()
        changed = [file for file in self.files.values() if self.differs(file)]
        gone = [path for path in old["files"] if path not in self.files]
        missing = self.missing(changed)
        new = generation(self.request, old, self.parents & {*old["directories"], *missing})
        if not changed and not gone and same(old, new):
            return False
        if changed:
            self.validate()
        self.disk.write(self.transaction.home / "generation", json.dumps(new).encode())
        self.disk.write(self.transaction.home / "current.json", json.dumps(new).encode())
        touched = {file["path"]: file for file in changed}
        touched.update((path, old["files"][path]) for path in gone)
        stopped = stops(gone, old["files"])
        owed = self.promises(touched, stopped)
        if RELOAD in owed:
            self.guard.ready()
        if owed:
            self.disk.write(self.transaction.home / "owed", json.dumps(owed).encode())
        temporary = {beside(file["path"]): file for file in changed}
        journal = {
            "directories": missing,
            "moves": {source: file["path"] for source, file in temporary.items()},
            "stops": stopped,
            "gone": gone,
            "empty": sorted(set(old["directories"]) - set(new["directories"]), reverse=True),
            "generation": new["generation"],
        }
        self.transaction.prepare(journal, self.staged(temporary))
        self.changes += len(changed) + len(gone)
        return True

    def staged(self, files: dict[str, Json]) -> Iterator[tuple[Path, bytes, int, Sequence[int]]]:
        for source, file in files.items():
            emit("stage", path=file["path"])
            yield self.disk.at(source), self.blob(file), file["mode"], self.ids(file)

    def differs(self, file: Json) -> bool:
        """Whether the file is not as wanted; Failed where none can be put."""
        path = self.disk.at(file["path"])
        content = self.disk.content(path)
        if content == "directory" or file["path"] in self.parents:
            raise Failed(f"{file['path']} is a directory; a file is wanted there")
        if content != file["sha256"]:
            return True
        info = os.lstat(path)
        ids = self.ids(file) or (info.st_uid, info.st_gid)
        return (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) != (file["mode"], *ids)

    def ids(self, file: Json) -> tuple[int, int] | tuple[()]:
        """Numbers of its user and group; empty where owners do not matter."""
        if self.disk.root:
            return ()
        try:
            return pwd.getpwnam(file["owner"]).pw_uid, grp.getgrnam(file["group"]).gr_gid
        except KeyError as error:
            raise Failed(f"{file['path']}: {error.args[0]}") from None

    def missing(self, files: Iterable[Json]) -> list[str]:
        """Directories to make, parents first."""
        parents = {str(p) for file in files for p in Path(file["path"]).parents}
        return sorted(parent for parent in parents if not self.disk.at(parent).exists())

    def promises(self, touched: dict[str, Json], stopped: Iterable[str]) -> dict[str, str]:
        """What is owed once the files are in place, together with what was owed before."""
        if not self.runs:
            return {}
        units = any(path.startswith(UNITS + "/") for path in touched)
        owed = {**({RELOAD: RELOAD} if units else {}), **self.state.owed()}
        for file in touched.values():
            for unit in file["reloads"]:
                owed.setdefault(unit, "reload")
            owed.update(dict.fromkeys(file["restarts"], "restart"))
        for unit in set(stopped).difference(*map(named, self.files.values())):
            owed.pop(unit, None)
        return owed

    def validate(self) -> None:
        """Let every checker read the files as they will be, in a tree of their own."""
        checks = {}
        for file in self.files.values():
            staged = Path(f"{self.transaction.home}/root{file['path']}")
            checks.update(
                {tuple(a.replace("{path}", str(staged)) for a in file["validate"]): staged}
            )
        checks.pop((), None)
        if not checks or not self.runs:
            return
        self.shadow()
        for argv, staged in checks.items():
            emit("check", argv=argv)
            check(argv, staged)

    def shadow(self) -> None:
        for file in self.files.values():
            path = Path(f"{self.transaction.home}/root{file['path']}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.blob(file))
            path.chmod(file["mode"])

    # commands

    def ensure_all(self, part: Json, before: bool) -> None:
        wanted = [e for e in part["ensures"] if e["before"] == before]
        units = [unit for file in part["files"] for unit in named(file)]
        for ensure in wanted if self.runs else ():
            self.changes += ensured(ensure, units, self.guard.ready)

    def activate_guarded(self) -> None:
        """Activate; whatever comes of it, tell of containers that lost their GPUs meanwhile."""
        try:
            self.activate()
        except Failed as error:
            raise Failed("\n".join(filter(None, (str(error), self.guard.lost())))) from None
        lost = self.guard.lost()
        if lost:
            raise Failed(lost)

    def activate(self) -> None:
        """Pay what is owed: what no part names, then part by part, each with its ensures."""
        orders = [
            [u for key in ("restarts", "reloads") for file in p["files"] for u in file[key]]
            for p in self.parts
        ]
        owed = self.state.owed()
        if RELOAD in owed:
            self.guard.ready()
        self.pay([unit for unit in owed if all(unit not in units for units in orders)])
        for part, units in zip(self.parts, orders):  # noqa: B905
            self.pay(units)
            self.ensure_all(part, before=False)

    def pay(self, units: Iterable[str]) -> None:
        owed = self.state.owed()
        for unit in units:
            if unit in owed:
                self.restarts += act(unit, owed[unit])
                del owed[unit]
                self.state.owe(owed)

    def left_out(self) -> None:
        """Say what a host that is a folder does not show."""
        units = set().union(*map(named, self.files.values()))
        validators = sum(bool(f["validate"]) for f in self.files.values())
        ensures = sum(len(part["ensures"]) for part in self.parts)
        if not self.runs and (units or validators or ensures):
            emit("left_out", validators=validators, ensures=ensures, units=sorted(units))


def beside(path: str) -> str:
    """A name in the same directory that nobody has taken."""
    directory, _, name = path.rpartition("/")
    short = os.fsdecode(os.fsencode(name)[:200])  # a name has 255 bytes at most
    return f"{directory}/.{short}.inferfleet-{os.urandom(4).hex()}"


def explained(error: Failed | OSError, outlook: str) -> str:
    """What to tell the user; a Failed has said it all."""
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}; {outlook}"
    return str(error)


def main() -> int:
    os.umask(0o022)  # what ensures make is not ours alone to read
    signal.signal(signal.SIGHUP, lambda *_: None)  # the client may go; a handler ends at exec
    os.environ["PATH"] = ":".join(filter(None, (os.environ.get("PATH"), PATH)))
    root = os.environ.get("INFERFLEET_ROOT", "").rstrip("/")
    disk = Disk(root, int(os.environ.get("INFERFLEET_CRASH_AT", "0")))
    request = json.loads(sys.stdin.buffer.readline())
    apply = Apply(request, disk, not root or bool(os.environ.get("INFERFLEET_RUN")))
    try:
        apply.carry_out(sys.stdin.buffer)
    except (Failed, OSError) as error:
        emit("failed", message=explained(error, apply.outlook))
        return 1
    apply.left_out()
    emit("done", changes=apply.changes, restarts=apply.restarts)
    return 0
