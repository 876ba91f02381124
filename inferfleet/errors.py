"""Everything that can go wrong for a user, as one small tree.

    Error
    ├── UsageError                   the command was called wrongly; exit code 2
    ├── InventoryError(problems)     what the user wrote; every problem at once
    ├── RenderError                  a template or a value that cannot be rendered
    ├── SecretError                  a reference that cannot be resolved
    └── HostError(host)              one host; its siblings go on
        ├── TransportError           it could not be reached, or refused us
        │   └── PasswordError        sudo asks for a password, and there is none
        └── ApplyError               it was reached, and a step failed there

A bug is none of these and keeps its traceback. Only `inferfleet.cli` turns errors into exit codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong in what the user wrote: `file:line:column: key path: message`.

    A warning stops nothing: it is shown, and the inventory is used as it is.
    """

    file: str
    line: int
    column: int
    path: str
    message: str
    warning: bool = False

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        message = f"warning: {self.message}" if self.warning else self.message
        return f"{place}: {self.path}: {message}" if self.path else f"{place}: {message}"


class Error(Exception):
    """What the user can act on; its text is shown as it is, without a traceback."""


class UsageError(Error):
    """A command was given something that does not exist, or not enough."""


class InventoryError(Error):
    """All that is wrong with an inventory, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems))
        super().__init__("\n".join(map(str, self.problems)))


class RenderError(Error):
    """A template used what it must not, or a value cannot be written in the file's format."""


class SecretError(Error):
    """A secret's reference cannot be resolved; never holds the value."""


class HostError(Error):
    """One host failed. `host` is its inventory name; the text begins with it."""

    def __init__(self, host: str, message: str) -> None:
        self.host = host
        self.message = message
        super().__init__(f"{host}: {message}")


class TransportError(HostError):
    """The host could not be reached, or did not let us in; nothing was changed there."""


class PasswordError(TransportError):
    """sudo asks for a password, and the inventory has none; somebody may be asked for it."""


class ApplyError(HostError):
    """A step failed on the host; the message ends with the last lines it printed."""
