"""`inferfleet init`: a project folder with the example inventory, to be edited."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from inferfleet.errors import Error
from inferfleet.roles import shipped

_IGNORED = """\
# secrets and what they are made from never belong in a repository
inventory/secrets/
build/
"""


def make(folder: Path) -> Iterator[Path]:
    """Copy the example inventory into `folder`; refuses to overwrite one. Yields what it made."""
    target = folder / "inventory"
    if target.exists():
        raise Error(f"{target}: exists already; nothing was changed")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(shipped("inventory"), target, ignore=shutil.ignore_patterns("known_hosts"))
    yield from sorted(path for path in target.rglob("*") if path.is_file())
    ignored = folder / ".gitignore"
    if not ignored.exists():
        ignored.write_text(_IGNORED, encoding="utf-8")
        yield ignored
