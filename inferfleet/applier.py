"""Runs on a host: makes its files, units and ensures what one request says, or leaves them alone.

Sent over the wire by `inferfleet.wire` and never installed: standard library, Python 3.8 or newer.
All it remembers lies in /var/lib/inferfleet:

    lock             flocked for as long as an apply runs; says who holds it
    owed             units whose restart or reload was promised and not yet done
    current.json     the manifest of the last finished run; generations/ holds the last few
    blobs/           the contents they name, by SHA-256
    transaction/     `journal` while files are staged; renamed to `commit`, they will be swapped in

So a run that is cut short is undone by the next one up to the commit, and finished from there on.
INFERFLEET_ROOT makes a folder the host: owners do not matter there and no command is run, unless
INFERFLEET_RUN is set. INFERFLEET_CRASH_AT=N ends the process as if killed, before its Nth change.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import hashlib
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Json = dict[str, Any]

UNITS = "/etc/systemd/system"
RELOAD = "daemon-reload"
KEPT = 5  # generations
LINES = 15  # of a failing command's output
TEST_SECONDS = 30
CHECK_SECONDS = 60
UNIT_SECONDS = 900


class Failed(Exception):  # noqa: N818
    """A step failed; the text is for the user."""


class Disk:
    """Files below a root. Every change is a step, and durable once its directory is synced."""

    def __init__(self, root: str, crash_at: int = 0) -> None:
        self.root = root
        self.steps_left = crash_at

    def at(self, path: str) -> Path:
        """Where the absolute `path` of the host really is."""
        return Path(self.root + path)

    def step(self) -> None:
        self.steps_left -= 1
        if self.steps_left == 0:
            os._exit(137)

    def content(self, path: Path) -> str:
        """The SHA-256 of a regular file, else what `path` is; a symlink is not followed."""
        with contextlib.suppress(PermissionError):
            mode = self.mode(path)
            if not stat.S_ISREG(mode):
                return kind(mode)
            return hashlib.sha256(path.read_bytes()).hexdigest()
        return "file"

    def mode(self, path: Path) -> int:
        """Type and permission bits; 0 when nothing is there."""
        try:
            return os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def write(self, path: Path, content: bytes, mode: int = 0o600, ids: Sequence[int] = ()) -> None:
        """A new file of user and group `ids`, on the disk when this returns."""
        self.remove(path)
        self.step()
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                self.step()
                file.write(content[len(content) // 2 :])
                file.flush()
                if ids:
                    os.fchown(fd, *ids)
                os.fchmod(fd, mode)  # after chown, which clears some bits
                os.fsync(fd)
        except OSError as error:  # a failing write does not say of what
            error.filename = str(path)
            raise

    def move(self, source: Path, target: Path) -> None:
        """Put `source` in the place of `target`, unless that was done before."""
        self.step()
        if self.mode(source):
            source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file or symlink; a directory that has come in its place stays."""
        mode = self.mode(path)
        if mode and not stat.S_ISDIR(mode):
            self.step()
            path.unlink()

    def make(self, directory: Path, mode: int = 0o755) -> None:
        """A directory and its parents, durable."""
        if not directory.is_dir():
            self.make(directory.parent)
            self.step()
            directory.mkdir(mode)
            self.sync(directory.parent)

    def drop(self, directory: Path) -> None:
        """Remove a directory if it is empty."""
        with contextlib.suppress(OSError):
            self.step()
            directory.rmdir()

    def sync(self, directory: Path) -> None:
        """Make renames and removals in `directory` durable."""
        if directory.is_dir():
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(fd)
            os.close(fd)


def kind(mode: int) -> str:
    """What is not a regular file, in the words of `FileState`."""
    if not mode:
        return "absent"
    if stat.S_ISLNK(mode):
        return "symlink"
    return "directory" if stat.S_ISDIR(mode) else "other"


def emit(event: str, **fields: Any) -> None:
    """Tell the client; when it is gone, go on in silence."""
    line = json.dumps({"event": event, **fields}) + "\n"
    with contextlib.suppress(OSError):
        os.write(1, line.encode())


def run(argv: Sequence[str], seconds: float, cwd: str = "/") -> tuple[int, str]:
    """Exit status (124: ran out of time, 127: cannot start) and the end of what was printed."""
    # a file, not a pipe: a daemon the command leaves behind would keep a pipe open
    output = os.memfd_create("output")
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
        status = waited(process, seconds)
        printed = os.pread(output, 1 << 16, max(0, os.fstat(output).st_size - (1 << 16)))
    except OSError as error:
        return 127, f"{argv[0]}: {error.strerror}"
    finally:
        os.close(output)
    return status, printed.decode("utf-8", "replace")


def waited(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Its exit status; out of time, its whole process group is asked to end, then killed."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return 124


def tail(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-LINES:])


def outcome(status: int, seconds: float) -> str:
    return f"ran out of time after {seconds:g} s" if status == 124 else f"exit status {status}"


class State:
    """What an applier remembers on a host."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.home = disk.at("/var/lib/inferfleet")
        self.transaction = self.home / "transaction"
        self.blobs = self.home / "blobs"
        self.generations = self.home / "generations"

    def lock(self, owner: str, reason: str) -> None:
        """Hold the host until this process ends, however it ends."""
        self.disk.make(self.home.parent)
        self.disk.make(self.home, 0o700)
        fd = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        for attempt in range(21):  # a probe holds it for a moment
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 20:
                    raise Failed(f"locked by {self.holder()}") from None
                time.sleep(0.05)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        holder = {"owner": owner, "reason": reason, "time": since, "pid": os.getpid()}
        os.truncate(fd, 0)
        os.write(fd, json.dumps(holder).encode())

    def unlock(self) -> None:
        os.truncate(self.home / "lock", 0)

    def holder(self) -> str:
        try:
            return "{owner} since {time} ({reason})".format(**self.read(self.home / "lock"))
        except (ValueError, KeyError):
            return "another run"

    def read(self, path: Path) -> Json:
        """The JSON object in a file; empty when there is none."""
        try:
            found: Json = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def manifest(self) -> Json:
        empty = {"generation": 0, "phase": "", "files": {}, "directories": []}
        return self.read(self.home / "current.json") or empty

    def owed(self) -> dict[str, str]:
        """Units (and "daemon-reload") by what was promised them, in the order of the promise."""
        return self.read(self.home / "owed")

    def owe(self, owed: dict[str, str]) -> None:
        path = self.home / "owed"
        if owed:
            self.disk.write(path.with_name("owed.new"), json.dumps(owed).encode())
            self.disk.move(path.with_name("owed.new"), path)
        else:
            self.disk.remove(path)
        self.disk.sync(self.home)

    def sweep(self) -> None:
        """Keep the last generations, and the blobs they name."""
        numbers = sorted((int(p.stem) for p in self.generations.glob("*.json")), reverse=True)
        kept = [self.generations / f"{number}.json" for number in numbers[:KEPT]]
        for number in numbers[KEPT:]:
            self.disk.remove(self.generations / f"{number}.json")
        manifests = [self.read(path) for path in kept]
        named = {f["sha256"] for manifest in manifests for f in manifest["files"].values()}
        for blob in self.blobs.glob("*"):
            if blob.name not in named:
                self.disk.remove(blob)


class Transaction:
    """Files on their way to their places: prepared, committed, finished; or undone."""

    def __init__(self, disk: Disk, state: State, runs: bool) -> None:
        self.disk, self.state, self.runs = disk, state, runs
        self.home = state.transaction

    def recover(self) -> None:
        """Finish or undo what a former run left."""
        if (self.home / "commit").exists():
            self.finish()
            emit("recovered", how="finished")
        elif self.home.exists():
            self.undo()
            emit("recovered", how="undone")

    def undo(self) -> None:
        """Take away all that was staged; what is committed stays for the next run to finish."""
        if (self.home / "commit").exists():
            return
        journal = self.state.read(self.home / "journal")
        for source in journal.get("moves", ()):
            self.disk.remove(self.disk.at(source))
        for directory in reversed(journal.get("directories", ())):
            self.disk.drop(self.disk.at(directory))
        self.discard()

    def prepare(
        self, journal: Json, files: Iterable[tuple[Path, bytes, int, Sequence[int]]]
    ) -> None:
        """Stage `files` beside their targets; from the end of this on, the next run finishes."""
        self.disk.write(self.home / "journal", json.dumps(journal).encode())
        self.disk.sync(self.home)
        for directory in journal["directories"]:
            self.disk.make(self.disk.at(directory))
        for path, content, mode, ids in files:
            self.disk.write(path, content, mode, ids)
        self.sync(journal["moves"])
        self.disk.move(self.home / "journal", self.home / "commit")
        self.disk.sync(self.home)

    def finish(self) -> None:
        """Put all in its place. Every step may have been done before. Needs no disk space."""
        journal = self.state.read(self.home / "commit")
        self.disk.move(self.home / "owed", self.state.home / "owed")
        self.disk.sync(self.state.home)
        for unit, path in journal["stops"].items():
            if self.runs and self.disk.at(path).exists():
                stop(unit)
        for source, target in journal["moves"].items():
            self.disk.move(self.disk.at(source), self.disk.at(target))
        for path in journal["gone"]:
            emit("remove", path=path)
            self.disk.remove(self.disk.at(path))
        self.sync([*journal["moves"], *journal["gone"]])
        for directory in journal["empty"]:
            self.disk.drop(self.disk.at(directory))
        self.record(journal["generation"])
        self.discard()

    def record(self, generation: int) -> None:
        self.disk.move(self.home / "generation", self.state.generations / f"{generation}.json")
        self.disk.sync(self.state.generations)
        self.disk.move(self.home / "current.json", self.state.home / "current.json")
        self.disk.sync(self.state.home)

    def sync(self, paths: Iterable[str]) -> None:
        for directory in sorted({self.disk.at(path).parent for path in paths}):
            self.disk.sync(directory)

    def discard(self) -> None:
        """Forget the transaction, its commit mark last."""
        for path in self.home.glob("*"):
            if path.is_dir():
                self.disk.step()
                shutil.rmtree(path)
            elif path.name != "commit":
                self.disk.remove(path)
        self.disk.remove(self.home / "commit")
        self.disk.drop(self.home)
        self.disk.sync(self.state.home)


class Apply:
    """One request carried out."""

    def __init__(self, request: Json, disk: Disk, runs: bool) -> None:
        self.request, self.disk, self.runs = request, disk, runs
        self.state = State(disk)
        self.transaction = Transaction(disk, self.state, runs)
        self.parts: list[Json] = request["parts"]
        self.files: dict[str, Json] = {f["path"]: f for p in self.parts for f in p["files"]}
        self.changes = self.restarts = 0

    def carry_out(self, stream: BinaryIO) -> None:
        """All of it; Failed or OSError when a step fails. Up to the commit, all is then undone."""
        self.state.lock(self.request["owner"], self.request["reason"])
        # before anything of ours (a package, a recovery) may change these files
        self.check_expected()
        self.transaction.recover()
        try:
            self.store(stream)
            for part in self.parts:
                self.ensure_all(part, before=True)
            staged = self.stage()
        except (Failed, OSError):
            self.transaction.undo()
            self.state.sweep()
            raise
        if staged:
            self.transaction.finish()
        self.state.sweep()
        self.activate()
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
        new = self.manifest(old, missing)
        if not changed and not gone and same(old, new):
            return False
        if changed:
            self.validate()
        self.disk.write(self.transaction.home / "generation", json.dumps(new).encode())
        self.disk.write(self.transaction.home / "current.json", json.dumps(new).encode())
        touched = {file["path"]: file for file in changed}
        touched.update((path, old["files"][path]) for path in gone)
        owed = self.promises(touched)
        if owed:
            self.disk.write(self.transaction.home / "owed", json.dumps(owed).encode())
        temporary = {beside(file["path"]): file for file in changed}
        journal = {
            "directories": missing,
            "moves": {source: file["path"] for source, file in temporary.items()},
            "stops": stops(gone, old["files"]),
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
        if content == "directory":
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

    def manifest(self, old: Json, missing: Iterable[str]) -> Json:
        needed = {str(p) for path in self.files for p in Path(path).parents}
        entry = ("sha256", "mode", "owner", "group", "restarts", "reloads")
        return {
            "generation": old["generation"] + 1,
            "phase": self.request["phase"],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "owner": self.request["owner"],
            "reason": self.request["reason"],
            "files": {
                file["path"]: {"role": part["role"], **{key: file[key] for key in entry}}
                for part in self.parts
                for file in part["files"]
            },
            "directories": sorted(needed & {*old["directories"], *missing}),
        }

    def promises(self, touched: dict[str, Json]) -> dict[str, str]:
        """What is owed once the files are in place, together with what was owed before."""
        if not self.runs:
            return {}
        units = any(path.startswith(UNITS + "/") for path in touched)
        owed = {**({RELOAD: RELOAD} if units else {}), **self.state.owed()}
        for file in touched.values():
            for unit in file["reloads"]:
                owed.setdefault(unit, "reload")
            owed.update(dict.fromkeys(file["restarts"], "restart"))
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
        units = [unit for file in part["files"] for unit in (*file["restarts"], *file["reloads"])]
        for ensure in wanted if self.runs else ():
            self.changes += ensured(ensure, units)

    def activate(self) -> None:
        """Pay what is owed: what no part names, then part by part, each with its ensures."""
        named = [
            [u for key in ("restarts", "reloads") for file in p["files"] for u in file[key]]
            for p in self.parts
        ]
        owed = self.state.owed()
        self.pay([unit for unit in owed if all(unit not in units for units in named)])
        for part, units in zip(self.parts, named):  # noqa: B905
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
        units = {u for f in self.files.values() for u in (*f["restarts"], *f["reloads"])}
        validators = sum(bool(f["validate"]) for f in self.files.values())
        ensures = sum(len(part["ensures"]) for part in self.parts)
        if not self.runs and (units or validators or ensures):
            emit("left_out", validators=validators, ensures=ensures, units=sorted(units))


def same(old: Json, new: Json) -> bool:
    """Whether two manifests say the same of the files."""
    return all(old[key] == new[key] for key in ("phase", "files", "directories"))


def beside(path: str) -> str:
    """A name in the same directory that nobody has taken."""
    directory, _, name = path.rpartition("/")
    short = os.fsdecode(os.fsencode(name)[:200])  # a name has 255 bytes at most
    return f"{directory}/.{short}.inferfleet-{os.urandom(4).hex()}"


def stops(gone: Iterable[str], files: dict[str, Json]) -> dict[str, str]:
    """Units to stop, with the unit file each loses; of a template, the units that were named."""
    found = {}
    named = {u for f in files.values() for u in (*f["restarts"], *f["reloads"])}
    for path in gone:
        directory, _, name = path.rpartition("/")
        stem, at, suffix = name.partition("@.")
        instances = [u for u in named if u.startswith(stem + "@") and u.endswith("." + suffix)]
        if directory == UNITS and "." in name:
            found.update(dict.fromkeys(sorted(instances) if at else [name], path))
    return found


def check(argv: Sequence[str], staged: Path) -> None:
    """Let a validator read a staged file; Failed when it finds fault."""
    status, printed = run(argv, CHECK_SECONDS, cwd=str(staged.parent))
    if argv[0].endswith("systemd-analyze") and "verify" in argv:
        # it exits 0 on unknown keys, and speaks of other units too
        status = status or any(staged.name in line for line in printed.splitlines())
    if status:
        said = printed.replace(str(staged), staged.name)
        raise Failed(f"{staged.name} is not valid, says {argv[0]}:\n{tail(said)}")


def stop(unit: str) -> None:
    emit("unit", unit=unit, verb="stop", state="running")
    status, printed = run(["systemctl", "disable", "--now", unit], UNIT_SECONDS)
    emit("unit", unit=unit, verb="stop", state="failed" if status else "ok")
    if status:
        why = outcome(status, UNIT_SECONDS)
        raise Failed(f"{unit} cannot be stopped ({why}); the next run goes on:\n{tail(printed)}")
    run(["systemctl", "reset-failed", unit], UNIT_SECONDS)  # or it is listed as failed for ever


def act(unit: str, verb: str) -> bool:
    """Do what a unit is owed; False when there is no such unit any more."""
    argv = ["systemctl", "reload-or-restart" if verb == "reload" else verb]
    if verb != RELOAD:
        argv.append(unit)
        if run(["systemctl", "cat", unit], TEST_SECONDS)[0]:
            emit("unit", unit=unit, verb=verb, state="gone")
            return False
    emit("unit", unit=unit, verb=verb, state="running")
    status, printed = run(argv, UNIT_SECONDS)
    emit("unit", unit=unit, verb=verb, state="failed" if status else "ok")
    if status:
        why = f"{verb} of {unit} failed ({outcome(status, UNIT_SECONDS)}); it is still owed:"
        raise Failed("\n".join((why, tail(printed), journal([unit]))).rstrip())
    return verb != RELOAD


def journal(units: Sequence[str]) -> str:
    """The last lines that units wrote; empty without units or a journal."""
    chosen = [word for unit in dict.fromkeys(units) for word in ("-u", unit)]
    lines = ["-n", str(LINES), "--no-pager", "-o", "cat"]
    status, printed = run(["journalctl", *chosen, *lines], TEST_SECONDS) if units else (1, "")
    return "" if status else tail(printed)


def ensured(ensure: Json, units: Sequence[str]) -> bool:
    """Make an ensure's test pass; False when it does already. Failed shows what `units` wrote."""
    title, seconds = ensure["title"], ensure["timeout"]
    if test(ensure, TEST_SECONDS)[0] == 0:
        return False
    emit("ensure", title=title, state="running")
    status, printed = fix(ensure) if ensure["run"] else wait(ensure)
    emit("ensure", title=title, state="failed" if status else "ok")
    if status:
        why = f"{title}: {outcome(status, seconds)}"
        logs = "" if ensure["run"] else journal(units)
        raise Failed("\n".join(part for part in (why, tail(printed), logs) if part))
    return True


def test(ensure: Json, seconds: float) -> tuple[int, str]:
    return run(["sh", "-c", ensure["test"]], seconds)


def fix(ensure: Json) -> tuple[int, str]:
    status, printed = run(["sh", "-c", ensure["run"]], ensure["timeout"])
    if status:
        return status, printed
    status, reason = test(ensure, TEST_SECONDS)
    return status, f"{printed}{reason}its test still fails\n" if status else ""


def wait(ensure: Json) -> tuple[int, str]:
    """Repeat the test until it passes or the time is over."""
    end = time.monotonic() + ensure["timeout"]
    while True:
        left = end - time.monotonic()
        status, printed = test(ensure, min(TEST_SECONDS, max(left, 0.5)))
        if status == 0 or time.monotonic() >= end:
            return (124 if status else 0), printed
        time.sleep(0.5)


def main() -> int:
    os.umask(0o022)  # what ensures make is not ours alone to read
    signal.signal(signal.SIGHUP, lambda *_: None)  # the client may go; a handler ends at exec
    os.environ["PATH"] = (
        os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
    )
    root = os.environ.get("INFERFLEET_ROOT", "").rstrip("/")
    disk = Disk(root, int(os.environ.get("INFERFLEET_CRASH_AT", "0")))
    request = json.loads(sys.stdin.buffer.readline())
    apply = Apply(request, disk, not root or bool(os.environ.get("INFERFLEET_RUN")))
    try:
        apply.carry_out(sys.stdin.buffer)
    except Failed as error:
        emit("failed", message=str(error))
        return 1
    except OSError as error:
        emit("failed", message=f"{error.filename}: {error.strerror}")
        return 1
    apply.left_out()
    emit("done", changes=apply.changes, restarts=apply.restarts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
