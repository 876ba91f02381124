"""Labs for test sessions: `lab = lab_fixture("alpha", "beta")` in a conftest or a test module."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from inferfleet import lab as labs

REASONS = labs.requirements()


def lab_fixture(
    *names: str, label: str = "test", disk: str = "1G", binds: tuple[labs.Bind, ...] = ()
) -> Callable[[], Iterator[labs.Lab]]:
    """A session fixture: the hosts `names`, booted when first asked for, gone at the end.

    Give each fixture of a session a `label` of its own.
    """

    @pytest.fixture(scope="session")
    def lab() -> Iterator[labs.Lab]:
        require_lab()
        take_down_remains(label)
        name = f"{label}-{os.getpid()}"
        with labs.Lab.boot(names, name=name, disk=disk, binds=binds) as booted:
            yield booted

    return lab


def require_lab() -> None:
    """Skip where no lab can run; fail instead where one is promised."""
    if REASONS:
        leave_out("; ".join(REASONS))


def leave_out(why: str) -> NoReturn:
    """Skip a test of real hosts; fail instead where these are promised."""
    if os.environ.get("CI") or os.environ.get("INFERFLEET_REQUIRE_LAB") == "1":
        pytest.fail(why)
    pytest.skip(why)


def take_down_remains(label: str) -> None:
    """Take down the labs of test sessions that were killed."""
    for name in labs.running():
        match = re.fullmatch(rf"{label}-(\d+)", name)
        if match and not _alive(int(match[1])):
            labs.take_down(name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
