"""What an applier remembers on a host, and files on their way to their places."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferfleet.applier.commands import emit, stop
from inferfleet.applier.disk import Disk, Failed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Json = dict[str, Any]

KEPT = 5  # generations


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
        for attempt in range(11):  # a probe holds it for a moment
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 10:
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

    def committed(self) -> bool:
        """Whether its files will be put in their places, by this run or the next."""
        return (self.home / "commit").exists()

    def recover(self) -> None:
        """Finish or undo what a former run left."""
        if self.committed():
            self.finish()
            emit("recovered", how="finished")
        elif self.home.exists():
            self.undo()
            emit("recovered", how="undone")

    def undo(self) -> None:
        """Take away all that was staged; what is committed stays for the next run to finish."""
        if self.committed():
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
        self.disk.write(self.home / "journal.new", json.dumps(journal).encode())
        self.disk.move(self.home / "journal.new", self.home / "journal")
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
