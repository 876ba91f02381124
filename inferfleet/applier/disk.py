"""Durable changes to files below a root."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Failed(Exception):
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
