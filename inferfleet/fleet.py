"""The chosen hosts of a phase together: surveyed, examined, shown, pushed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rich.console import Console

from inferfleet import outlook, outlook_lines, push, report
from inferfleet.errors import HostError, PasswordError
from inferfleet.facts.doctor import diagnose_surveyed, failing
from inferfleet.model import Bundle, Finding, Host, Plan, Result
from inferfleet.project import Project
from inferfleet.push import Surveyed
from inferfleet.render import Reveal
from inferfleet.secrets import scrub
from inferfleet.transport import Options


@dataclass
class Fleet:
    """Hosts that answered, with open channels; `results` are those of hosts that fell out."""

    project: Project
    plan: Plan
    surveyed: list[Surveyed] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    interrupted: bool = False

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close all channels, but leave alone what was left to finish by itself."""
        for host in self.surveyed if kind is not KeyboardInterrupt else ():
            host.close()

    @property
    def waiting(self) -> bool:
        """Whether anything would change."""
        return any(host.diff for host in self.surveyed)

    def _failed(self, host: str, message: str) -> Result:
        """A host's failure; what a host printed may hold a secret, so those are masked."""
        said = scrub(message, self.project.secrets)
        return Result(host, "failed", seconds=time.monotonic() - self.began, error=said)

    def examine(self) -> None:
        """Let the doctor look at the hosts that would change; one it finds unfit falls out."""
        self.findings = diagnose_surveyed(self.project, self.plan, self.surveyed)
        errors = failing(self.findings)
        for host in list(self.surveyed):
            own = [finding.what for finding in errors if finding.host == host.name]
            if not own:
                continue
            more = f" (and {report.counted(len(own) - 1, 'more error')})" if len(own) > 1 else ""
            said = f"{own[0]}{more}; nothing was changed (--skip-doctor pushes all the same)"
            self._drop(host, said)

    def refuse(self) -> None:
        """Let hosts that must not be touched fall out."""
        for host in [host for host in self.surveyed if host.diff.refused]:
            self._drop(host, push.refusal(host).message)

    def _drop(self, host: Surveyed, why: str) -> None:
        self.results.append(self._failed(host.name, why))
        self.surveyed.remove(host)
        host.close()

    def push(self, reason: str, *, quiet: bool) -> None:
        """Make every host as its bundle says; `results` then has all of them, in order."""
        out = report.console(stderr=True)
        out.quiet = quiet
        with report.Progress(out, [host.name for host in self.surveyed if host.diff]) as progress:
            told = partial(self._told, progress)
            work = partial(push.apply, reason=reason, on_event=told)
            futures = push.begin(self.surveyed, work)
            heard = report.console(stderr=True) if quiet else out
            self.interrupted = not _finished(futures, heard)
        for future, host in futures.items():
            self.results.append(self._result(host.name, future))
        order = [host.name for host in self.plan.hosts]
        self.results.sort(key=lambda result: order.index(result.host))

    def _result(self, host: str, future: Future[Result | HostError]) -> Result:
        if future.cancelled():
            return Result(host, "skipped", error="interrupted before it began")
        outcome = future.result()
        return self._failed(host, outcome.message) if isinstance(outcome, HostError) else outcome

    def _told(self, progress: report.Progress, host: str, event: dict[str, Any]) -> None:
        """Pass an event on; what a host's command printed is masked as its failure would be."""
        if event["event"] == "output":
            event = {**event, "line": scrub(event["line"], self.project.secrets)}
        progress.event(host, event)

    def show(self, *, lines: bool, failures: bool = True) -> None:
        """What would change; "no changes" first, and alone, when nothing would."""
        out = report.console()
        summary = report.plan_summary([host.diff for host in self.surveyed], len(self.results))
        if not self.results and not self.waiting:
            out.print(summary)
            return
        for host in self.surveyed:
            report.show_lock(out, host.name, host.snapshot.lock)
            before = host.before() if lines else None
            report.show_diff(out, host.diff, push.changed(host), before)
        for result in self.results if failures else ():
            out.print(f"[bold]{result.host}[/]: {report.result_line(result)}")
        out.print(summary)


def _finished(futures: Collection[Future[Any]], out: Console) -> bool:
    """Wait for all; False when Ctrl-C was pressed, which begins no more of them.

    KeyboardInterrupt when it is pressed again.
    """
    try:
        wait(futures)
    except KeyboardInterrupt:
        begun = [future for future in futures if not future.cancel()]
        running = report.counted(sum(not future.done() for future in begun), "host")
        out.print(f"finishing on {running}; Ctrl-C again leaves them to finish by themselves")
        wait(begun)
        return False
    return True


def survey(
    project: Project,
    plan: Plan,
    hosts: Sequence[Host],
    secrets: Reveal,
    ask: Callable[[Sequence[str]], str] | None = None,
) -> Fleet:
    """Ask every host what it has, in parallel; the fleet is in the plan's order.

    `ask` is given the names of hosts whose sudo wants a password that the inventory has not, and
    gives one for them all; it is called once at most.
    """
    bundles, options = project.bundles(plan, hosts, secrets), project.options()
    fleet, found = Fleet(project, plan), _surveyed(bundles, options)
    lacking = [b for b in bundles if isinstance(found[b.host.name], PasswordError)]
    if lacking and ask and (password := ask([bundle.host.name for bundle in lacking])):
        found |= _surveyed(lacking, replace(options, become_password=lambda _: password))
    for host in hosts:
        outcome = found[host.name]
        if isinstance(outcome, HostError):
            fleet.results.append(fleet._failed(host.name, outcome.message))
        else:
            fleet.surveyed.append(outcome)
    return fleet


def _surveyed(bundles: Sequence[Bundle], options: Options) -> dict[str, Surveyed | HostError]:
    outcomes = push.each(bundles, lambda bundle: push.survey(bundle, options))
    return {bundle.host.name: outcome for bundle, outcome in outcomes}


def expected(project: Project, plan: Plan) -> tuple[list[str], dict[str, list[dict[str, Any]]]]:
    """What to expect of the plan before any host is asked: lines, and for JSON.

    What a rehearsal leaves out, where instances were placed, what deployments can carry.
    """
    found = outlook.outlooks(plan, project.inventory)
    roles = {p.role: project.library.role(p.role) for p in plan.phase.placements}
    left = [name for name, role in roles.items() if plan.rehearsal and not role.rehearsable]
    lines = [
        *([f"Left out in a rehearsal: {', '.join(left)}."] if left else []),
        *outlook_lines.placed(plan),
        *(outlook_lines.line(one, plan.phase.users) for one in found),
    ]
    return lines, {"capacity": [outlook_lines.details(one, plan.phase.users) for one in found]}
