"""What every task shares: errors become exit codes here, and nowhere else.

0: fine. 1: problems, or hosts that failed. 2: wrong usage; with --detailed-exitcode: changes wait.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.parser.argument import Argument
from invoke.tasks import Task, task

from inferfleet.errors import Error, InventoryError, UsageError

if TYPE_CHECKING:
    from inferfleet.project import Project

FINE, PROBLEMS, USAGE, INTERRUPTED, CUT = 0, 1, 2, 130, 141  # as shells count signals
INVENTORY = "the inventory's folder (default: inventory/)"
LIMIT = "only these hosts: names, groups, globs, with commas between"
PHASE = "the phase, such as pilot"
JSON = "one JSON document instead of text"
REHEARSE = "the simulator in place of every engine: no GPUs, no weights, all else real"


class _Task(Task):  # type: ignore[type-arg]
    """Invoke tells an option's help to the first who asks; this one remembers it."""

    def get_arguments(self, ignore_unknown_help: bool | None = None) -> list[Argument]:
        if not hasattr(self, "_arguments"):
            self._arguments = super().get_arguments(ignore_unknown_help)
        return copy.deepcopy(self._arguments)


def command(**helps: str) -> Callable[[Callable[..., int]], Any]:
    """A task whose errors are shown without a traceback and become exit codes."""

    def decorate(function: Callable[..., int]) -> Any:
        @functools.wraps(function)
        def run(context: Context, /, *args: Any, **options: Any) -> None:
            as_json = bool(options.get("json"))
            try:
                if context.config.run.dry:
                    raise UsageError("--dry is invoke's own; `plan` shows what would change")
                code = function(context, *args, **options)
            except Error as error:
                code = _shown(error, as_json=as_json)
            except OSError as error:
                if error.filename is None:
                    raise
                why = (error.strerror or str(error)).lower()
                code = _shown(Error(f"{error.filename}: {why}"), as_json=as_json)
            except KeyboardInterrupt:
                print("\ninterrupted; a host that had begun finishes by itself", file=sys.stderr)
                _leave(INTERRUPTED)
            if code:
                raise Exit(code=code)

        positional = ["host"] if "host" in helps else []
        return task(help=helps, positional=positional, klass=_Task)(run)

    return decorate


def _leave(code: int) -> NoReturn:
    """End at once: the threads that serve hosts would be waited for otherwise."""
    with contextlib.suppress(OSError):  # whoever read it was interrupted, too
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _shown(error: Error, *, as_json: bool) -> int:
    if as_json:
        from dataclasses import asdict

        from inferfleet.report import as_json as write

        found = [asdict(p) for p in error.problems] if isinstance(error, InventoryError) else []
        write({"ok": False, "problems": found or [{"message": str(error)}]})
    else:
        print(error, file=sys.stderr)
        if isinstance(error, InventoryError):
            count = sum(not problem.warning for problem in error.problems)
            print(f"{count} problem{'s' if count > 1 else ''}.", file=sys.stderr)
    return USAGE if isinstance(error, UsageError) else PROBLEMS


def project(inventory: str) -> Project:
    """The project whose inventory is in that folder."""
    from inferfleet.project import Project

    return Project(Path(inventory))


def warn(found: Project, *, quiet: bool = False) -> None:
    """What the inventory's checks warn of, on standard error."""
    for warning in found.inventory.warnings if not quiet else ():
        print(warning, file=sys.stderr)


def agreed(question: str) -> bool:
    """Whether somebody at the terminal says yes."""
    if not sys.stdin.isatty():
        raise UsageError("nobody to ask here: add --yes, or run it on a terminal")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D is no answer
        print()
        return False
