"""The tasks: what `invoke` and `inferfleet` run. Exit codes are made here and nowhere else.

0: fine. 1: problems, or hosts that failed. 2: wrong usage; with --detailed-exitcode: changes wait.
Heavy imports stand inside the tasks, so that listing them stays fast.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.exceptions import Exit, ParseError
from invoke.program import Program
from invoke.tasks import task

from inferfleet import __version__
from inferfleet.errors import Error, InventoryError, UsageError

if TYPE_CHECKING:
    from inferfleet.errors import HostError
    from inferfleet.model import Result
    from inferfleet.project import Project
    from inferfleet.push import Surveyed

FINE, PROBLEMS, USAGE, INTERRUPTED = 0, 1, 2, 130
_INVENTORY = "the inventory's folder (default: inventory/)"
_LIMIT = "only these hosts: names, groups, globs, with commas between"
_PHASE = "the phase, such as pilot"
_JSON = "one JSON document instead of text"
_REHEARSE = "the simulator in place of every engine: no GPUs, no weights, all else real"


def command(**helps: str) -> Callable[[Callable[..., int]], Any]:
    """A task whose errors are shown without a traceback and become exit codes."""

    def decorate(function: Callable[..., int]) -> Any:
        @functools.wraps(function)
        def run(context: Context, /, *args: Any, **options: Any) -> None:
            try:
                code = function(context, *args, **options)
            except Error as error:
                code = _shown(error, as_json=bool(options.get("json")))
            except KeyboardInterrupt:
                print("interrupted; hosts finish what they began", file=sys.stderr)
                code = INTERRUPTED
            if code:
                raise Exit(code=code)

        return task(help=helps, positional=["host"] if "host" in helps else [])(run)

    return decorate


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


def _project(inventory: str) -> Project:
    from inferfleet.project import Project

    return Project(Path(inventory))


def _warn(project: Project, *, quiet: bool = False) -> None:
    """What the inventory's checks warn of, on standard error."""
    for warning in project.inventory.warnings if not quiet else ():
        print(warning, file=sys.stderr)


@command(inventory=_INVENTORY, limit=f"{_LIMIT}; here: that there are such", json=_JSON)
def check(_: Context, inventory: str = "inventory", limit: str = "", json: bool = False) -> int:
    """Is the inventory right? Everything that is wrong, in one list; no host is touched."""
    from dataclasses import asdict

    from inferfleet import report

    project = _project(inventory)
    found = project.inventory
    project.limited(found.hosts.values(), limit)
    counts = {
        what: len(getattr(found, what)) for what in ("hosts", "models", "deployments", "phases")
    }
    _warn(project, quiet=json)
    if json:
        report.as_json({"ok": True, "problems": [asdict(w) for w in found.warnings], **counts})
    else:
        said = ", ".join(f"{count} {what}" for what, count in counts.items())
        print(f"{inventory}: fine ({said}).")
    return FINE


@command(
    phase=f"{_PHASE}; default: all of them",
    inventory=_INVENTORY,
    limit=_LIMIT,
    output="where to write (default: build/<phase>)",
    rehearse=_REHEARSE,
    json="print the index instead of a summary",
)
def render(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    output: str = "",
    rehearse: bool = False,
    json: bool = False,
) -> int:
    """Write what each host would get to build/<phase>/<host>/..., for review; secrets masked."""
    from inferfleet import report, tree

    project = _project(inventory)
    names = [phase] if phase else list(project.inventory.phases)
    if output and len(names) > 1:
        raise UsageError("--output is for one phase: say which with --phase")
    indexes = {}
    for name in names:
        plan = project.plan(name, rehearse=rehearse)
        folder = Path(output) if output else Path("build") / name
        bundles = project.bundles(plan, project.chosen(plan, limit))
        indexes[name] = tree.write(folder, bundles, plan)
        if not json:
            files = sum(len(host["files"]) for host in indexes[name].values())
            print(f"{folder}/: {files} files for {len(bundles)} hosts, and {tree.INDEX}")
    if json:
        report.as_json(indexes)
    return FINE


@command(
    phase=_PHASE,
    inventory=_INVENTORY,
    limit=_LIMIT,
    rehearse=_REHEARSE,
    detailed_exitcode="2 when changes wait, 0 when none do",
    json=_JSON,
)
def plan(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    rehearse: bool = False,
    detailed_exitcode: bool = False,
    json: bool = False,
) -> int:
    """What would change on the hosts, as a diff. Changes nothing."""
    from inferfleet import report
    from inferfleet.secrets import Tolerant

    project = _project(inventory)
    expected = _expected(project, phase, rehearse, quiet=json)
    surveyed, failures = _survey(project, phase, limit, rehearse, Tolerant(project.secrets))
    diffs = [host.diff for host in surveyed]
    if json:
        from dataclasses import asdict

        failed = {result.host: result.error for result in failures}
        hosts = {diff.host: asdict(diff) for diff in diffs}
        report.as_json({"ok": not failures, "hosts": hosts, "failed": failed, **expected})
    else:
        _show_plan(surveyed, failures)
    for host in surveyed:
        host.close()
    if failures:
        return PROBLEMS
    return USAGE if detailed_exitcode and any(diffs) else FINE


def _expected(
    project: Project, phase: str, rehearse: bool, *, quiet: bool
) -> dict[str, list[dict[str, Any]]]:
    """Say what each deployment is expected to carry and where it was placed; also for JSON."""
    from inferfleet import outlook
    from inferfleet import outlook_lines as said

    plan = project.plan(phase, rehearse=rehearse)
    _warn(project, quiet=quiet)
    found = outlook.outlooks(plan, project.inventory)
    if not quiet:
        for line in [*said.placed(plan), *(said.line(o, plan.phase.users) for o in found)]:
            print(line)
    return {"capacity": [said.details(o, plan.phase.users) for o in found]}


def _survey(
    project: Project, phase: str, limit: str, rehearse: bool, secrets: Any
) -> tuple[list[Surveyed], list[Result]]:
    """Every chosen host asked, in the plan's order, and those that could not be."""
    import time

    from inferfleet import push
    from inferfleet.errors import HostError

    plan = project.plan(phase, rehearse=rehearse)
    bundles = project.bundles(plan, project.chosen(plan, limit), secrets)
    options, began = project.options(), time.monotonic()
    surveyed: dict[str, Surveyed] = {}
    failures = []
    for bundle, outcome in push.each(bundles, lambda b: push.survey(b, options)):
        if isinstance(outcome, HostError):
            failures.append(_failed(project, bundle.host.name, outcome, began))
        else:
            surveyed[bundle.host.name] = outcome
    names = [bundle.host.name for bundle in bundles]
    failures.sort(key=lambda result: names.index(result.host))
    return [surveyed[name] for name in names if name in surveyed], failures


def _show_plan(surveyed: list[Surveyed], failures: list[Result], *, lines: bool = True) -> None:
    from inferfleet import report
    from inferfleet.push import changed

    out = report.console()
    summary = report.plan_summary([host.diff for host in surveyed], len(failures))
    if not failures and not any(host.diff for host in surveyed):
        out.print(summary)
        return
    for host in surveyed:
        before = host.before() if lines else None
        report.show_diff(out, host.diff, changed(host), before)
    for result in failures:
        out.print(f"[bold]{result.host}[/]: {report.result_line(result)}")
    out.print(summary)


@command(
    phase=_PHASE,
    inventory=_INVENTORY,
    limit=_LIMIT,
    rehearse=_REHEARSE,
    yes="do not ask",
    skip_doctor="push even where the hosts do not fit the plan",
    json=_JSON + "; needs --yes",
)
def provision(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    rehearse: bool = False,
    yes: bool = False,
    skip_doctor: bool = False,
    json: bool = False,
) -> int:
    """Bring the hosts to what the inventory says: shows the plan, asks, pushes, sums up."""
    from inferfleet import report
    from inferfleet.facts import reporting

    if json and not yes:
        raise UsageError("--json cannot ask: add --yes")
    project = _project(inventory)
    expected = _expected(project, phase, rehearse, quiet=json)
    surveyed, results = _survey(project, phase, limit, rehearse, project.secrets)
    try:
        plan = project.plan(phase, rehearse=rehearse)
        if not skip_doctor and not reporting.fit(project, plan, surveyed, as_json=json):
            return PROBLEMS
        if not json:
            _show_plan(surveyed, results, lines=not yes)
        if any(host.diff for host in surveyed) and not (yes or _agreed()):
            print("nothing was changed.")
            return PROBLEMS
        results += _push(project, surveyed, f"provision {phase}", quiet=json)
    finally:
        for host in surveyed:
            host.close()
    for warning in project.secrets.warnings:
        print(warning, file=sys.stderr)
    order = {name: index for index, name in enumerate(project.inventory.hosts)}
    results.sort(key=lambda result: order[result.host])
    if json:
        from dataclasses import asdict

        hosts = {result.host: asdict(result) for result in results}
        report.as_json({"ok": _all_fine(results), "hosts": hosts, **expected})
    elif any(result.status != "unchanged" for result in results):
        report.show_results(report.console(), results)
    return FINE if _all_fine(results) else PROBLEMS


def _all_fine(results: list[Result]) -> bool:
    return all(result.status != "failed" for result in results)


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UsageError("nobody to ask here: add --yes, or run it on a terminal")
    return input("Make these changes? [y/N] ").strip().lower() in ("y", "yes")


def _failed(project: Project, host: str, error: HostError, began: float) -> Result:
    """A host's failure; what a host printed may hold a secret, so those are masked."""
    import time

    from inferfleet.model import Result
    from inferfleet.secrets import scrub

    said = scrub(error.message, project.secrets)
    return Result(host, "failed", seconds=time.monotonic() - began, error=said)


def _push(project: Project, surveyed: list[Surveyed], reason: str, *, quiet: bool) -> list[Result]:
    import time

    from inferfleet import push, report
    from inferfleet.errors import HostError

    began, results = time.monotonic(), []
    out = report.console(stderr=True)
    out.quiet = quiet
    with report.Progress(out, [host.name for host in surveyed if host.diff]) as progress:
        for host, outcome in push.each(surveyed, lambda h: push.apply(h, reason, progress.event)):
            if isinstance(outcome, HostError):
                outcome = _failed(project, host.name, outcome, began)
            results.append(outcome)
    return results


@command(
    phase=_PHASE,
    inventory=_INVENTORY,
    limit=_LIMIT,
    rehearse=_REHEARSE,
    junit="where to write the JUnit report (default: build/verify-<phase>.xml)",
    disruptive="also restart every unit and prove that it comes back; cuts running requests",
    json=_JSON,
)
def verify(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    rehearse: bool = False,
    junit: str = "",
    disruptive: bool = False,
    json: bool = False,
) -> int:
    """Prove that the hosts do what they should: units, ports, keys, real tokens, streams."""
    from inferfleet import verify as verifying

    project = _project(inventory)
    plan = project.plan(phase, rehearse=rehearse)
    hosts = project.chosen(plan, limit)
    report = Path(junit) if junit else Path("build") / f"verify-{plan.phase.name}.xml"
    return verifying.run(project, plan, hosts, report, disruptive=disruptive, as_json=json)


@command(
    phase=_PHASE,
    inventory=_INVENTORY,
    limit=_LIMIT,
    rehearse=_REHEARSE,
    json=_JSON,
)
def doctor(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    rehearse: bool = False,
    json: bool = False,
) -> int:
    """Hold the plan against what the hosts really are. Changes nothing."""
    from inferfleet.facts import reporting
    from inferfleet.facts.doctor import diagnose, failing

    project = _project(inventory)
    plan = project.plan(phase, rehearse=rehearse)
    hosts = project.chosen(plan, limit)
    findings = diagnose(project, plan, hosts)
    reporting.show(findings, len(hosts), as_json=json)
    return PROBLEMS if failing(findings) else FINE


@command(
    host="which hosts: names, groups, globs, with commas between (default: all)",
    local="this machine; no inventory is needed",
    write="set gpus, ram_gib and disk_gib of each host in the inventory's own file",
    inventory=_INVENTORY,
    json=_JSON,
)
def discover(
    _: Context,
    host: str = "",
    local: bool = False,
    write: bool = False,
    inventory: str = "inventory",
    json: bool = False,
) -> int:
    """What hosts are: GPUs and what runs on them, memory, disks, software, ports."""
    from inferfleet.facts import reporting

    if local and (host or write):
        raise UsageError("--local is this machine alone, and needs no inventory to look at or edit")
    if local:
        return reporting.discover_local(as_json=json)
    return reporting.discover(_project(inventory), host, write=write, as_json=json)


@command(
    output="where to write it (default: inventory/schema.json)",
    inventory=_INVENTORY,
    json="to standard output instead of a file",
)
def schema(_: Context, inventory: str = "inventory", output: str = "", json: bool = False) -> int:
    """Publish the inventory's JSON Schema, with every role's options, for editors."""
    from inferfleet.schema import published

    project = _project(inventory)
    text = published(project.library)
    if json:
        print(text, end="")
        return FINE
    path = Path(output) if output else project.folder / "schema.json"
    path.write_text(text, encoding="utf-8")
    print(f"{path}: written.")
    return FINE


@command(
    host="the host, by its inventory name",
    replace="replace a key that is known already, knowingly",
    yes="do not ask: the fingerprint was compared by other means",
    inventory=_INVENTORY,
)
def trust(
    _: Context,
    host: str,
    replace: bool = False,
    yes: bool = False,
    inventory: str = "inventory",
) -> int:
    """Show a host's key fingerprint and record it in inventory/known_hosts."""
    from inferfleet import transport
    from inferfleet.yamlbuild import did_you_mean

    project = _project(inventory)
    hosts = project.inventory.hosts
    if host.startswith("-"):
        raise UsageError("say the host first: inferfleet trust HOST [--replace] [--yes]")
    if host not in hosts:
        raise UsageError(f"there is no host '{host}'{did_you_mean(host, hosts)}")
    keys = transport.fingerprint(hosts[host], project.options())
    for key in keys:
        print(f"{host}: {key.fingerprint} ({key.type})")
    if not yes:
        print("Compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on its console.")
    if not yes and not _agreed():
        print("nothing was recorded.")
        return PROBLEMS
    path = project.known_hosts
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(transport.trust(known, keys, replace=replace), encoding="utf-8")
    print(f"{path}: {host} is trusted.")
    return FINE


_MODEL = "a repository, an Ollama tag, or the path of a folder with its config.json"
_GPU = "the GPU's name, such as L40S"
_CONTEXT = "tokens of one request, prompt and answer (default: the model's limit)"
_USERS = "how many ask at the same time (default: 1)"


@command(
    model=_MODEL,
    gpu=_GPU,
    count="how many of them one host has (default: 1)",
    context=_CONTEXT,
    users=_USERS,
    quantization="how the weights are stored (default: as the repository has them)",
    tensor_parallel="GPUs of an instance (default: the fewest on which it fits)",
    sequences="max-num-seqs (default: the engine's)",
    batched_tokens="max-num-batched-tokens (default: the engine's)",
    kv_dtype="type of the KV cache, such as fp8",
    utilization="gpu-memory-utilization (default: the engine's)",
    engine_version="vLLM's release (default: the newest known)",
    memory="GiB of one GPU as CUDA reports it, in place of the catalogue's",
    eager="without CUDA graphs",
    json=_JSON,
)
def fit(
    _: Context,
    model: str = "",
    gpu: str = "",
    count: str = "",
    context: str = "",
    users: str = "",
    quantization: str = "",
    tensor_parallel: str = "",
    sequences: str = "",
    batched_tokens: str = "",
    kv_dtype: str = "",
    utilization: str = "",
    engine_version: str = "",
    memory: str = "",
    eager: bool = False,
    json: bool = False,
) -> int:
    """Does a model fit a GPU, how many requests does it carry, and what to change if not."""
    from inferfleet import advice, charts, report

    asked = advice.Question(
        model, gpu, count, context, users, quantization, tensor_parallel, sequences,
        batched_tokens, kv_dtype, utilization, engine_version, memory, eager,
    )  # fmt: skip
    found, many = advice.fit(asked), advice.whole("users", users, 1)
    if json:
        report.as_json(advice.fit_json(found, many))
    else:
        charts.show_fit(report.console(), found, many)
    return PROBLEMS if found.prediction.verdict == "does not fit" else FINE


@command(
    host="a host of the inventory, in place of --gpu",
    gpu=_GPU,
    count="how many of them one host has (default: 1)",
    users=_USERS,
    context="tokens of one request, prompt and answer (default: 16384)",
    task="what for: code or chat (default: chat)",
    inventory=_INVENTORY,
    json=_JSON,
)
def recommend(
    _: Context,
    host: str = "",
    gpu: str = "",
    count: str = "",
    users: str = "",
    context: str = "",
    task: str = "chat",
    inventory: str = "inventory",
    json: bool = False,
) -> int:
    """What to run on a GPU or a host, why, and what the next larger GPU would buy."""
    from inferfleet import advice, charts, report

    if bool(host) == bool(gpu):
        raise UsageError("say either --gpu or --host")
    many, length = advice.whole("users", users, 1), advice.whole("context", context, 16384)
    if host:
        machine = _project(inventory).host(host)
        found = advice.recommend_host(machine, many, length, task)
    else:
        several = advice.whole("count", count, 1)
        found = advice.recommend(advice.gpu_of(gpu), several, many, length, task)
    if json:
        report.as_json(advice.advice_json(found))
    else:
        charts.show_advice(report.console(), found, many)
    return FINE if found.found else PROBLEMS


@command(
    model=_MODEL,
    users=_USERS,
    context=_CONTEXT,
    gpu="only this kind of GPU",
    gpus_per_host="GPUs that one host can have (default: 8)",
    quantization="how the weights are stored (default: as the repository has them)",
    output="write the first answer as a phase for an inventory to this file",
    json=_JSON,
)
def size(
    _: Context,
    model: str = "",
    users: str = "",
    context: str = "",
    gpu: str = "",
    gpus_per_host: str = "",
    quantization: str = "",
    output: str = "",
    json: bool = False,
) -> int:
    """What hardware a model and its users need, and a phase file for it."""
    from inferfleet import advice, charts, phasefile, report

    advice.needed(model=model)
    many, length = advice.whole("users", users, 1), advice.length("context", context)
    per_host = advice.whole("gpus-per-host", gpus_per_host, 8)
    found = advice.sizes(model, many, length, gpu, per_host, quantization)
    if output:
        Path(output).write_text(phasefile.text(found[0], model, many), encoding="utf-8")
    if json:
        report.as_json({"ok": True, "users": many, "sizes": advice.sizes_json(found)})
    else:
        charts.show_sizes(report.console(), found, many)
        if output:
            print(f"{output}: written; fill in its hosts, then: inferfleet check")
    return FINE


@command(folder="where (default: here)")
def init(_: Context, folder: str = ".") -> int:
    """Make a project folder with an inventory to start from."""
    from inferfleet.start import make

    for path in make(Path(folder)):
        print(path)
    print("Edit inventory/hosts.yml, then: inferfleet check")
    return FINE


@command(
    hosts="how many hosts to boot",
    down="take the lab down",
    name="the lab's name, where there are several",
)
def lab(_: Context, hosts: int = 3, down: bool = False, name: str = "lab") -> int:
    """Boot real hosts (systemd, sshd) on this machine to rehearse on, or take them down."""
    from inferfleet.lab import rehearsal

    return rehearsal.down(name) if down else rehearsal.up(name, hosts)


@command(keep="leave the hosts running afterwards")
def demo(_: Context, keep: bool = False) -> int:
    """Take a rehearsal from pilot to production on three hosts made for it."""
    from inferfleet.lab import demo as shown

    return shown.run(keep=keep)


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
    schema,
    trust,
    init,
    lab,
    demo,
)


class _Program(Program):
    """Invoke's own program, except that wrong usage is exit code 2, as everywhere else."""

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
    _Program(name="inferfleet", binary="inferfleet", version=__version__, namespace=namespace).run()
