"""Prove it on the hosts: each role's testinfra tests, in parallel, over our own transport."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from inferfleet import calibration
from inferfleet.errors import Error
from inferfleet.model import Host, Plan
from inferfleet.project import Project

WORKERS = 8  # processes; hosts are spread over them


def run(
    project: Project,
    plan: Plan,
    hosts: Sequence[Host],
    junit: Path,
    *,
    disruptive: bool = False,
    as_json: bool = False,
) -> int:
    """Run the tests of all roles on `hosts`; prints a report, writes JUnit XML, returns 0 or 1.

    Raises Error when the extra `verify` is not installed, or no role on these hosts has tests.
    """
    if not all(map(find_spec, ("pytest", "testinfra", "xdist"))):
        raise Error("verify needs more packages: pip install 'inferfleet[verify]'")
    from inferfleet.verify.outcome import Outcome

    files = tests(project, plan, hosts)
    if not files:
        raise Error("no role on these hosts has tests")
    outcome = Outcome([host.name for host in hosts], quiet=as_json)
    _pass(_arguments(project, plan, hosts, junit), files, outcome)
    if disruptive:  # afterwards and one host after another: never all engines down at once
        restarts = junit.with_stem(f"{junit.stem}-restarts")
        arguments = _arguments(project, plan, hosts, restarts, "--fleet-disruptive", "-n", "1")
        _pass(arguments, files, outcome)
    code = outcome.report(junit, as_json=as_json)
    if not plan.rehearsal:  # a simulator's memory teaches nothing
        changed = calibration.record(project.folder, outcome.observed)
        if changed and not as_json:
            print(f"{project.folder / calibration.FILE}: {changed} corrected; worth committing.")
    return code


def _pass(arguments: list[str], files: Sequence[Path], outcome: object) -> None:
    """One run of pytest, untouched by any configuration the user may have around."""
    import pytest

    with tempfile.TemporaryDirectory() as empty, _without("PYTEST_ADDOPTS"):
        configuration = Path(empty) / "pytest.ini"
        configuration.write_text("[pytest]\n", encoding="utf-8")
        where = ["-c", str(configuration), "--rootdir", empty]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = pytest.main([*where, *arguments, *map(str, files)], plugins=[outcome])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise Error(f"the tests could not be run:\n{said.getvalue()[-3000:]}")


def tests(project: Project, plan: Plan, hosts: Sequence[Host]) -> list[Path]:
    """The test files of the roles that run on these hosts."""
    names = {step.role for host in hosts for step in plan.steps[host.name]}
    found = [project.library.role(name).folder / f"test_{name}.py" for name in sorted(names)]
    return [path.resolve() for path in found if path.is_file()]


def _arguments(
    project: Project, plan: Plan, hosts: Sequence[Host], junit: Path, *more: str
) -> list[str]:
    junit.parent.mkdir(parents=True, exist_ok=True)
    return [
        *("-p", "no:pytest11.testinfra", "-p", "no:cacheprovider"),
        *("-p", "inferfleet.verify.plugin", "--import-mode", "importlib", "--tb", "short"),
        *("-n", str(min(WORKERS, len(hosts))), "--dist", "loadgroup"),
        *("--junit-xml", str(junit), "-o", "junit_family=xunit1"),
        *("--fleet-inventory", str(project.folder.resolve()), "--fleet-phase", plan.phase.name),
        *("--fleet-hosts", ",".join(host.name for host in hosts)),
        *(["--fleet-rehearse"] if plan.rehearsal else []),
        *more,
    ]


@contextlib.contextmanager
def _without(variable: str) -> Iterator[None]:
    kept = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[variable] = kept
