"""The vocabulary: frozen dataclasses and the pure builders roles use. No stage lives here."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from inferfleet.errors import Problem


@dataclass(frozen=True, slots=True)
class Secret:
    """A reference to a secret, never the secret: `kind` and what it points to.

    Its text is always the mask, so that no f-string, log or traceback can reveal the value;
    only the quoting filters of a renderer that was given resolved values write it.
    """

    kind: Literal["env", "file", "cmd", "vault"]
    reference: str

    def __str__(self) -> str:
        shown = "string" if self.kind == "vault" else self.reference
        return f"<secret {self.kind}:{shown}>"

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a host, or a MIG slice of one. `index` counts in PCI bus order.

    GPUs of one `island` are joined by NVLink or share a NUMA node. `device` is how nvidia-smi and
    CDI count where slices come before: "2", or "0:1" for the second slice of the first GPU.
    """

    index: int
    model: str
    island: int = 0
    mig: str = ""  # a slice's profile, such as "3g.71gb"
    device: str = ""

    @property
    def name(self) -> str:
        """What containers ask for."""
        return self.device or str(self.index)


@dataclass(frozen=True, slots=True)
class Host:
    """A machine of the fleet. Sizes are GiB (2**30 bytes)."""

    name: str
    address: str
    connection: Literal["ssh", "local"] = "ssh"
    port: int | None = None  # None: what ssh_config says, else 22
    user: str | None = None  # None: what ssh_config says, else the login name
    key: str | None = None  # path of an identity file; None: ssh_config's and the agent's
    become: Literal["none", "sudo"] = "none"
    become_password: Secret | None = None
    host_keys: tuple[str, ...] = ()  # "SHA256:..." fingerprints; empty: known_hosts decides
    private_address: str = ""  # where engines listen for other hosts; defaults to the address
    groups: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    ram_gib: float | None = None
    disk_gib: float | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """An entry of the model catalogue."""

    name: str
    repository: str  # Hugging Face repository, an Ollama tag, or an absolute path on the host
    revision: str | None = None
    served_name: str = ""  # what clients ask for; defaults to the catalogue name
    quantization: str | None = None
    context_length: int | None = None  # tokens
    attention_heads: int | None = None
    dimensions: Mapping[str, Any] | None = None  # its shape by hand, see capacity.Dimensions
    config: str | None = None  # path of its config.json, relative to the inventory's folder


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model served by an engine on some hosts. `hosts` is resolved: names, no groups."""

    name: str
    engine: str
    model: Model
    hosts: tuple[str, ...]
    port: int
    gpus_per_instance: int = 1
    instances_per_host: int = 1
    instances: int | None = None  # over all its hosts, packed by the planner; None: per host
    gpus: tuple[int, ...] | None = None  # device indexes it may use; None: assigned in order
    api_key: Secret | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    extra_args: tuple[str, ...] = ()
    if_too_large: Literal["refuse", "warn"] = "refuse"  # where it is predicted not to fit


@dataclass(frozen=True, slots=True)
class Placement:
    """A role without a model (a balancer, say) on some hosts of a phase, with its settings."""

    role: str
    hosts: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Phase:
    """What runs where, for how many users, and why. `hosts` is all the phase owns."""

    name: str
    hosts: tuple[str, ...]
    deployments: tuple[str, ...]
    placements: tuple[Placement, ...]
    users: int
    why: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """A whole inventory, checked. `folder` is where relative secret files are looked up."""

    folder: str
    hosts: Mapping[str, Host]
    groups: Mapping[str, tuple[str, ...]]  # group -> host names, in inventory order
    models: Mapping[str, Model]
    deployments: Mapping[str, Deployment]
    phases: Mapping[str, Phase]
    warnings: tuple[Problem, ...] = ()
    calibration: Mapping[str, int] = field(default_factory=dict)  # see inferfleet.calibration


@dataclass(frozen=True, slots=True)
class Instance:
    """One engine process: a deployment on a host, with its own port and GPUs."""

    deployment: Deployment
    host: Host
    index: int
    port: int
    gpus: tuple[int, ...]
    listen: str  # the address it binds: loopback when only its own host asks it
    options: Mapping[str, Any]  # the engine's, defaults filled in, the host's variables applied

    @property
    def name(self) -> str:
        return f"{self.deployment.name}-{self.index}"

    @property
    def devices(self) -> tuple[str, ...]:
        """Its GPUs as containers ask for them: by number, or "0:1" for a MIG slice."""
        known = {gpu.index: gpu.name for gpu in self.host.gpus}
        return tuple(known.get(index, str(index)) for index in self.gpus)

    @property
    def unit(self) -> str:
        """Its systemd unit; named by what is served, so that changing the engine replaces it."""
        return f"inferfleet-{self.name}.service"

    @property
    def endpoint(self) -> str:
        """`address:port` as URLs write it, an IPv6 address in brackets."""
        return endpoint(self.listen, self.port)


@dataclass(frozen=True, slots=True)
class Step:
    """One role on one host: what the role's generator is asked to turn into artefacts."""

    host: Host
    role: str
    instances: tuple[Instance, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of a phase, by host name, in the order a host runs them.

    `hosts` also holds hosts without steps: they lose what a former run left there.
    """

    phase: Phase
    hosts: tuple[Host, ...]
    steps: Mapping[str, tuple[Step, ...]]
    rehearsal: bool = False
    folder: str = ""  # the inventory's, where relative paths of the operator's side begin

    def instances(self) -> Iterator[Instance]:
        """Every engine instance of the phase, in host order."""
        for steps in self.steps.values():
            for step in steps:
                yield from step.instances

    def deployed(self) -> dict[str, tuple[str, tuple[Instance, ...]]]:
        """Role and instances of each deployment that runs anywhere, in the phase's order."""
        found: dict[str, tuple[str, tuple[Instance, ...]]] = {}
        for steps in self.steps.values():
            for step in steps:
                for instance in step.instances:
                    name = instance.deployment.name
                    role, before = found.get(name, (step.role, ()))
                    found[name] = (role, (*before, instance))
        return {name: found[name] for name in self.phase.deployments if name in found}


@dataclass(frozen=True, slots=True)
class Artefact:
    """One file as wanted on a host.

    `validate` is the argv of a checker; `{path}` stands for the staged copy, beside which all
    other files of the host lie staged under the same root. `restarts` and `reloads` name units.
    """

    path: str
    content: bytes
    mode: int = 0o644
    owner: str = "root"
    group: str = "root"
    secret: bool = False
    validate: tuple[str, ...] = ()
    restarts: tuple[str, ...] = ()
    reloads: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the content, hex."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True, slots=True)
class Ensure:
    """A guarded command: when the shell script `test` fails, `run` is run and tested again.

    `before` puts it before the files are staged (packages, users: what validators and owners
    need); otherwise it runs after the units of its role were restarted. Without a `run` it is a
    thing to wait for: `test` is repeated until `timeout` seconds are over.
    """

    title: str
    test: str
    run: str = ""
    timeout: int = 300
    before: bool = False


@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything one host should have. `parts` keeps the roles' order for activation."""

    host: Host
    phase: str
    parts: tuple[tuple[str, tuple[Artefact | Ensure, ...]], ...] = ()

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        return tuple(a for _, part in self.parts for a in part if isinstance(a, Artefact))

    @property
    def ensures(self) -> tuple[Ensure, ...]:
        return tuple(e for _, part in self.parts for e in part if isinstance(e, Ensure))


@dataclass(frozen=True, slots=True)
class FileState:
    """One path as it is on a host; `digest` is empty for what is not a regular file."""

    path: str
    kind: Literal["file", "absent", "symlink", "directory", "other"] = "absent"
    mode: int = 0
    owner: str = ""
    group: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the probe saw on a host, in one round trip.

    `owned` maps every path a former run wrote to the units it restarts; `owed` are units whose
    restart or reload was promised and not yet done; `lock` describes who holds the host, or "".
    """

    host: str
    files: Mapping[str, FileState]
    failing: frozenset[int] = frozenset()  # indexes into Bundle.ensures
    owned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    owed: tuple[str, ...] = ()
    interrupted: bool = False
    phase: str = ""
    lock: str = ""
    generation: int = 0  # of the last finished run; 0: none yet
    python: str = ""  # version of its python3, such as "3.11"; "": none


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between a bundle and a snapshot."""

    kind: Literal["create", "update", "remove", "ensure", "pay", "move"]
    subject: str  # a path, an ensure's title, a unit, or a phase
    detail: str = ""  # "content", "mode 0644 -> 0600", ...
    units: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diff:
    """All that provisioning would change on one host; falsy when nothing would."""

    host: str
    changes: tuple[Change, ...] = ()
    restarts: tuple[str, ...] = ()
    reloads: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    moves_from: str = ""  # the phase that held the host until now, if another one
    unknown: tuple[str, ...] = ()  # files not compared, as a secret in them cannot be resolved
    refused: tuple[str, ...] = ()  # why a push will refuse all of it, each with a remedy

    def __bool__(self) -> bool:
        return bool(self.changes)


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """Something about a host that a plan will run into: what, why it hurts, what to do."""

    host: str
    check: str  # its kind, one word: "port", "driver", ...
    severity: Literal["error", "warning"]
    what: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; {self.why}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class Result:
    """How one host fared: one line of the summary."""

    host: str
    status: Literal["unchanged", "changed", "failed", "skipped"]
    changes: int = 0
    restarts: int = 0
    seconds: float = 0.0
    error: str = ""
    round_trips: int = 0


class Render(Protocol):
    """What a role's generator gets to make files with; see `inferfleet.render`.

    An artefact is `secret` when a secret went into it. Both raise RenderError.
    """

    def __call__(
        self,
        path: str,
        template: str,
        /,
        *,
        mode: int = 0o644,
        group: str = "root",
        validate: tuple[str, ...] = (),
        restarts: tuple[str, ...] = (),
        reloads: tuple[str, ...] = (),
        **values: Any,
    ) -> Artefact:
        """The file `path` from one of the role's templates."""
        ...

    def copy(
        self,
        path: str,
        source: str | Secret,
        /,
        *,
        mode: int = 0o644,
        group: str = "root",
        restarts: tuple[str, ...] = (),
        reloads: tuple[str, ...] = (),
    ) -> Artefact:
        """The file `path` as it stands in the role's folder, or as a secret refers to it."""
        ...


def endpoint(address: str, port: int) -> str:
    """`address:port` as URLs write it, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def sh(*argv: str) -> str:
    """The command line that runs exactly `argv` under a POSIX shell."""
    return shlex.join(argv)
