"""A host against the plan, GPUs apart: rights, ports, disk, memory, clock, names, containers."""

from __future__ import annotations

from collections.abc import Iterator

from inferfleet.facts.case import OWN, Case, described, gib
from inferfleet.facts.document import Container, Listener
from inferfleet.facts.drivers import number
from inferfleet.facts.weights import home, weight_bytes
from inferfleet.model import Finding, Instance

STATE = "/var/lib/inferfleet"
LEAST = 200 << 20  # bytes our own files, generations and logs may take
OFF, FAR_OFF = 5.0, 60.0  # seconds a clock may be off
SPARE = 1.1  # disk for weights: a download needs a little more than they do
LESS = 0.9  # of what the inventory says: below, it counts as less
JIT_CDI = (1, 18)  # the toolkit's release whose runtime injects by CDI
_EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 - read, never bound


def rights(case: Case) -> Iterator[Finding]:
    """We are root there, or become it."""
    if case.facts.uid != 0 and not case.facts.folder:
        remedy = "set `become: sudo` for the host"
        if not case.facts.sudo:
            remedy += ", and let the user run sudo"
        yield case.error(
            "rights",
            f"we are user {case.facts.uid} there, not root",
            "units, packages and users can only be made by root",
            remedy,
        )


def ports(case: Case) -> Iterator[Finding]:
    """What the plan listens on is free, or held by what the plan replaces."""
    if case.facts.folder:
        return
    for who, address, port in case.ports:
        for listener in case.facts.listeners:
            held = listener.port == port and _clash(address, listener.address)
            if held and not (case.ours(listener) or _published(case, listener)):
                yield _taken(case, who, port, listener)
                break


def _clash(wanted: str, taken: str) -> bool:
    return wanted == taken or wanted in _EVERYWHERE or taken in _EVERYWHERE


def _published(case: Case, listener: Listener) -> bool:
    """Whether Docker holds the port for one of our own containers."""
    return any(
        port == listener.port and container.project.startswith(OWN)
        for container in case.facts.containers.running
        for _, port in container.ports
    )


def _taken(case: Case, who: str, port: int, listener: Listener) -> Finding:
    stop = f"kill {listener.pid}" if listener.pid else "see `ss -ltnp`"
    if listener.unit:
        stop = f"systemctl disable --now {listener.unit}"
    holder = next(
        (
            f"container {one.name}"
            for one in case.facts.containers.running
            if any(number == port for _, number in one.ports)
        ),
        described(listener),
    )
    if holder.startswith("container "):
        stop = f"docker stop {holder.removeprefix('container ')}"
    return case.error(
        "port",
        f"port {port} of {who} is taken by {holder}",
        "it could not listen, and would restart for ever",
        f"stop that ({stop}), or choose another port",
    )


def disk(case: Case) -> Iterator[Finding]:
    """There is room for our own files, and for weights that are still to be downloaded."""
    state = case.facts.disk_of(STATE)
    if state and state.free < LEAST:
        yield case.warning(  # a push that fails for it says so, and leaves its siblings alone
            "disk",
            f"{state.mount} has {state.free >> 20} MiB free",
            "files could not be staged, nor logs be written",
            "make room there",
        )
    needed: dict[str, float] = {}
    for folder, instance in _downloading(case):
        here = case.facts.sizes.get(instance.deployment.model.repository, 0)
        size = weight_bytes(instance.deployment.model) or 0
        if here < LESS * size and (room := case.facts.disk_of(folder)):
            needed[room.mount] = needed.get(room.mount, 0) + SPARE * size - here
    for mount, total in needed.items():
        room = case.facts.disk_of(mount)
        if room and room.free < total:
            yield case.error(
                "disk",
                f"{mount} has {gib(room.free)} free, weights take {gib(total)}",
                "the download would fill it and fail half-way",
                "make room, or mount a larger disk there",
            )


def _downloading(case: Case) -> Iterator[tuple[str, Instance]]:
    """For each model that is downloaded to this host: where to, and an instance that wants it."""
    seen = set()
    for step in case.steps:
        for instance in step.instances:
            folder = home(step.role, instance, case.plan)
            wanted = (folder, instance.deployment.model.repository)
            if folder and not case.rehearsal and wanted not in seen:
                seen.add(wanted)
                yield folder, instance


def size(case: Case) -> Iterator[Finding]:
    """The inventory does not promise more memory or disk than there is."""
    said, ram = case.host.ram_gib, case.facts.ram_total / 2**30
    if case.rehearsal or case.facts.folder:
        return
    if said and ram and ram < LESS * said:
        yield case.warning(
            "size",
            f"it has {ram:.0f} GiB of memory, the inventory says {said:g}",
            "placement and staging count on what the inventory says",
            f"correct the inventory: `inferfleet discover --host {case.host.name} --write`",
        )


def clock(case: Case) -> Iterator[Finding]:
    """The clock agrees with ours."""
    offset = case.facts.clock_offset or 0.0
    if abs(offset) > OFF:
        yield (case.error if abs(offset) > FAR_OFF else case.warning)(
            "clock",
            f"its clock is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} ours",
            "certificates and package signatures are refused, and logs cannot be compared",
            "look at its time service: it says that the clock is kept"
            if case.facts.synchronized
            else "run a time service there (systemd-timesyncd or chrony)",
        )


def network(case: Case) -> Iterator[Finding]:
    """What engines are fetched from can be reached."""
    for target, why in case.facts.reach.items():
        if why:
            yield case.warning(
                "network",
                f"{target} cannot be reached: {why}",
                "what is not on the host yet could not be downloaded",
                "open the way, name a mirror, or bring the files; behind a proxy this is expected",
            )


def docker(case: Case) -> Iterator[Finding]:
    """Docker runs where instances need it."""
    needs = any(i.options.get("runtime") == "docker" for i in case.instances)
    if not needs or case.rehearsal or case.facts.folder or case.facts.containers.docker:
        return
    if any(step.role == "docker" for step in case.steps):
        return  # the plan brings it
    client = case.facts.containers.docker_client
    yield case.error(
        "docker",
        "Docker does not run" if client else "Docker is not installed",
        "the engine's container could not be started",
        "systemctl enable --now docker" if client else "add the docker role to the phase",
    )


def reload_guard(case: Case) -> Iterator[Finding]:
    """No running container would lose its GPUs when systemd reloads its units."""
    found = case.facts.containers
    if found.cgroup_driver != "systemd":
        return
    at_risk = [one.name for one in found.running if _legacy(one, found.toolkit)]
    if at_risk and not case.facts.folder:
        yield case.warning(
            "reload",
            f"a daemon-reload can take the GPUs away from {', '.join(at_risk[:4])}",
            "with the systemd cgroup driver, only devices that came by CDI are kept; "
            "NVML then fails with 'Unknown Error' in there",
            "use CDI device names; a push of ours keeps the devices or stops, others' do not",
        )


def _legacy(container: Container, toolkit: str) -> bool:
    by_runtime = container.gpu == "runtime" and number(toolkit) < JIT_CDI
    return container.gpu == "hook" or by_runtime


def unseen(case: Case) -> Iterator[Finding]:
    """What could not be looked at."""
    for problem in case.facts.problems:
        yield case.warning(
            "facts",
            f"could not be looked at: {problem}",
            "what it would have shown is not checked",
            "look yourself, or report it as a bug",
        )
