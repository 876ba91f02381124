"""The wheels of gateways on hosts made here, fetched once and kept."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path

from inferfleet import wheel, wheelhouse
from inferfleet.errors import Error
from inferfleet.lab import rootfs
from inferfleet.lab.machine import exclusive


def folder(say: Callable[[str], None]) -> Path | None:
    """A folder with all of them; None where pip cannot fetch them, which is said."""
    python = (rootfs.tree(say) / "usr/bin/python3").readlink().name.removeprefix("python")
    parts = [wheel.PINS.read_text("utf-8"), *wheel.wanted(), python, platform.machine()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    kept = rootfs.cache() / f"wheels-{key}"
    with exclusive(rootfs.cache() / "wheels.lock"):
        if not kept.is_dir():
            partial = kept.with_name(f"partial-{kept.name}")
            try:
                wheelhouse.fill(partial, python, platform.machine(), retries=1)
            except Error as error:
                say(f"gateways are left out, for want of their wheels: {error}")
                return None
            partial.rename(kept)
    return kept
