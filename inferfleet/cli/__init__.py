"""The tasks: what `invoke` and `inferfleet` run. Heavy imports stand inside, for a fast start."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable

from invoke.collection import Collection
from invoke.exceptions import Exit, ParseError
from invoke.program import Program

from inferfleet import __version__
from inferfleet.cli.capacity import fit, recommend, size
from inferfleet.cli.clients import clients
from inferfleet.cli.command import CUT, USAGE
from inferfleet.cli.cutover import cutover
from inferfleet.cli.hosts import discover, doctor, plan, provision, trust, verify
from inferfleet.cli.inventories import check, init, render, schema
from inferfleet.cli.load import bench
from inferfleet.cli.rehearsals import demo, lab

namespace = Collection(
    check,
    render,
    plan,
    doctor,
    provision,
    verify,
    discover,
    fit,
    recommend,
    size,
    bench,
    cutover,
    clients,
    schema,
    trust,
    init,
    lab,
    demo,
)

_OPTIONS = ("help", "version", "print-completion-script")


class _Program(Program):
    """Invoke's own program, but wrong usage is exit code 2, and help leaves out what is not ours.

    Invoke's options for shell commands stay where they are; no task of ours heeds them.
    """

    def print_help(self) -> None:
        print(f"Usage: {self.binary} TASK [--options]; `{self.binary} TASK --help` lists them.\n")
        self.list_tasks()
        print("Options:\n")
        self.print_columns([self.initial_context.help_for(f"--{name}") for name in _OPTIONS])

    def print_task_help(self, name: str) -> None:
        print(f"Usage: {self.binary} {name} [--options]\n")
        print(f"{inspect.getdoc(self.collection[name])}\n")
        print("Options:\n")
        self.print_columns(self.parser.contexts[name].help_tuples())

    def parse_core(self, argv: list[str] | None) -> None:
        _as_usage(lambda: super(_Program, self).parse_core(argv))

    def parse_tasks(self) -> None:
        _as_usage(super().parse_tasks)


def _as_usage(parse: Callable[[], None]) -> None:
    try:
        parse()
    except ParseError as error:
        raise Exit(str(error), code=USAGE) from error


def main() -> None:
    """The `inferfleet` command."""
    program = _Program(
        name="inferfleet", binary="inferfleet", version=__version__, namespace=namespace
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that it lacks is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        try:
            program.run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read along has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CUT) from None
