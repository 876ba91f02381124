"""Collects what the tests proved and says it: a line per host and proof, failures with why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.markup import escape

from inferfleet import report
from inferfleet.calibration import Observed


@dataclass(frozen=True)
class Proof:
    """One test on one host: what it proves, and if it did not, why."""

    host: str
    proves: str
    passed: bool
    seconds: float
    message: str = ""


class Outcome:
    """A pytest plugin of the process that reports; xdist brings it the workers' reports."""

    def __init__(self, hosts: list[str], *, quiet: bool) -> None:
        self.hosts = hosts
        self.proofs: list[Proof] = []
        self.observed: list[Observed] = []  # what engines say of their memory
        self.progress = report.Progress(report.console(stderr=True), hosts)
        self.progress.out.quiet = quiet

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            said = dict(report.user_properties)
            proof = Proof(
                host=str(said.get("host", "")),
                proves=str(said.get("proves", report.nodeid)),
                passed=report.passed,
                seconds=round(report.duration, 3),
                message=str(said.get("message", "")),
            )
            self.proofs.append(proof)
            if "calibration" in said:
                self.observed.append(Observed(**json.loads(str(said["calibration"]))))
            sign = "proved" if proof.passed else "FAILED"
            self.progress.say(proof.host, f"{sign}: {proof.proves}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            why = str(report.longrepr)[-2000:]
            self.proofs.append(Proof("", f"{report.nodeid} can be read", False, 0, why))

    def pytest_sessionstart(self) -> None:
        self.progress.__enter__()

    def pytest_sessionfinish(self) -> None:
        self.progress.__exit__()

    def report(self, junit: Path, *, as_json: bool) -> int:
        """Print all of it; 0 when everything was proved, 1 otherwise."""
        for host in self.hosts:
            if not any(proof.host == host for proof in self.proofs):
                self.proofs.append(Proof(host, "something runs here", False, 0, "nothing to prove"))
        failed = [proof for proof in self.proofs if not proof.passed]
        if as_json:
            found: dict[str, Any] = {"ok": not failed, "junit": str(junit)}
            report.as_json(found | {"proofs": [asdict(proof) for proof in self.proofs]})
        else:
            self._print()
            proofs, hosts = len(self.proofs), report.counted(len(self.hosts), "host")
            print(f"{proofs} proofs on {hosts}, {len(failed)} failed.")
            print(f"JUnit report: {junit}")
        return 1 if failed else 0

    def _print(self) -> None:
        out = report.console()
        for host in [*self.hosts, ""]:
            own = [proof for proof in self.proofs if proof.host == host]
            if not own:
                continue
            bad = sum(not proof.passed for proof in own)
            verdict = f"[bold red]{bad} failed[/]" if bad else "[green]proved[/]"
            out.print(f"[bold]{host or 'tests'}[/]: {verdict} ({len(own)})")
            for proof in sorted(own, key=lambda proof: proof.proves):
                sign = "[green]✓[/]" if proof.passed else "[red]✗[/]"
                out.print(f"  {sign} {escape(proof.proves)} [dim]({proof.seconds:.1f} s)[/]")
                if not proof.passed:
                    out.print(f"      {escape(proof.message)}")
