"""The gateway: one address for every client and every engine, from a wheel that travels along.

Its environment is made beside the one in use; then new workers take over from the old ones. Keys
alone are read again by themselves. What it is told is in `inferfleet.gateways`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from inferfleet import gateways, wheel
from inferfleet.builders import (
    VERIFY_COMPOSE,
    VERIFY_UNIT,
    answers,
    image_present,
    packages,
    running,
    system_user,
)
from inferfleet.gateways import FOLDER, STATE
from inferfleet.model import Artefact, Ensure, Plan, Render, Step, sh

KIND = "service"
ORDER = 80
ASKS_ENGINES = True
UNIT = "inferfleet-gateway.service"
SETUP = "inferfleet-gateway-setup.service"
USER = "inferfleet-gateway"
HOME = "/opt/inferfleet/gateway"
SCRIPT = f"{HOME}/install.sh"
COMPOSE = f"{FOLDER}/compose.yml"
WORKERS = f"/run/{USER}/workers.json"
DOCKER = ("/usr/bin/docker", "compose", "-f", COMPOSE)


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """Wheels and what installs them, configuration and keys, and the unit."""
    in_docker = step.settings["runtime"] == "docker"
    yield system_user(USER)
    yield from _environment(step, plan, render)
    yield from _told(step, plan, render)
    yield from (_docker if in_docker else _native)(step, render)
    yield _installed()
    yield running(UNIT)
    address, _, port = gateways.gateway(step, plan).private[0].rpartition(":")
    yield answers(UNIT, address.strip("[]"), int(port), "/health", 60)


def _environment(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    settings = step.settings
    in_docker, offline = settings["runtime"] == "docker", "wheels" in settings
    if in_docker:
        yield image_present(settings["image"].removeprefix("docker.io/"))
    elif not offline:
        test = sh(settings["python"], "-c", "import ensurepip, venv")
        yield packages("Python can make environments", test, ["python3-venv"])
    yield _wheel(wheel.FILE, wheel.gateway())
    for path in _wheels(step, plan) if offline else ():
        yield _wheel(path.name, path.read_bytes())
    yield render.copy(f"{HOME}/pins.txt", "pins.txt", restarts=(SETUP,), reloads=(UNIT,))
    yield render(
        SCRIPT,
        "install.sh.j2",
        mode=0o755,
        restarts=(SETUP,),
        reloads=(UNIT,),
        home=HOME,
        runtime=settings["image"] if in_docker else "native",
        checked=not in_docker,
        offline=offline,
        python=settings["python"],
        index_url=settings.get("index_url"),
        requirement=_requirement(settings),
    )


def _wheel(name: str, content: bytes) -> Artefact:
    path = f"{HOME}/wheels/{name}"
    return Artefact(path, content, restarts=(SETUP,), reloads=(UNIT,))


def _wheels(step: Step, plan: Plan) -> list[Path]:
    """The wheels the gateway needs, but for its own."""
    folder = _folder(step, plan)
    return [path for path in sorted(folder.glob("*.whl")) if path.name != wheel.FILE]


def _folder(step: Step, plan: Plan) -> Path:
    return Path(plan.folder) / Path(step.settings["wheels"]).expanduser()


def _requirement(settings: Any) -> str:
    extra = "[tracing]" if "tracing" in settings else ""
    return f"inferfleet-gateway{extra}=={wheel.VERSION}"


def _told(step: Step, plan: Plan, render: Render) -> Iterator[Artefact]:
    """Keys and certificates of engines and providers, then the configuration that names them."""
    for source in gateways.sources(step, plan):
        if source.deployment and source.deployment.api_key:
            path = gateways.key_file("engine", source.said)
            yield _key(path, source.deployment.api_key, render)
    for name, own in step.settings["providers"].items():
        if "key" in own:
            yield _key(gateways.key_file("provider", name), own["key"], render)
        if "ca" in own:
            path = gateways.ca_file(name)
            yield render.copy(path, own["ca"], mode=0o640, group=USER, reloads=(UNIT,))
    keys = gateways.keys(step)
    # workers look at it every second: a key that is gone is refused without a reload
    yield render(f"{FOLDER}/keys.json", "keys.json.j2", mode=0o640, group=USER, keys=keys)
    config = gateways.config(step, plan)
    yield render(f"{FOLDER}/config.json", "config.json.j2", reloads=(UNIT,), config=config)


def _key(path: str, key: Any, render: Render) -> Artefact:
    return render(path, "key.j2", mode=0o640, group=USER, reloads=(UNIT,), key=key)


def _commands() -> dict[str, list[str]]:
    """How it is started, and what a reload runs: a look at the new files, then the change."""
    python = [f"{HOME}/current/bin/python", "-m", "inferfleet.gateway"]
    own = [*python, "--config", f"{FOLDER}/config.json"]
    serve = [*own, "--state-file", WORKERS]
    return {"command": serve, "check": [*own, "--check"], "reload": serve}


def _native(step: Step, render: Render) -> Iterator[Artefact]:
    commands: dict[str, Any] = {key: ["/usr/bin/env", *line] for key, line in _commands().items()}
    yield render(
        f"/etc/systemd/system/{SETUP}",
        "setup.service.j2",
        validate=VERIFY_UNIT,
        restarts=(SETUP,),
        description="inferfleet gateway: its environment",
        script=SCRIPT,
        home=HOME,
    )
    yield render(
        f"/etc/systemd/system/{UNIT}",
        "gateway.service.j2",
        validate=VERIFY_UNIT,
        restarts=(UNIT,),
        description="inferfleet gateway",
        user=USER,
        drain_timeout=step.settings["drain_timeout"],
        **commands,
    )


def _docker(step: Step, render: Render) -> Iterator[Artefact]:
    settings, commands = step.settings, _commands()
    parts: dict[str, Any] = {"check": commands["check"], "reload": commands["reload"]}
    up = sh(*DOCKER, "up", "--no-log-prefix", "--abort-on-container-exit", "gateway")
    numbers = f"GATEWAY_USER=$(id -u {USER}):$(id -g {USER})"
    yield render(
        COMPOSE,
        "compose.yml.j2",
        validate=VERIFY_COMPOSE,
        restarts=(SETUP, UNIT),
        image=settings["image"].removeprefix("docker.io/"),
        home=HOME,
        folder=FOLDER,
        state=STATE,
        user=USER,
        command=commands["command"],
        drain_timeout=settings["drain_timeout"],
    )
    yield render(
        f"/etc/systemd/system/{SETUP}",
        "setup-docker.service.j2",
        validate=VERIFY_UNIT,
        restarts=(SETUP,),
        description="inferfleet gateway: its environment",
        compose=COMPOSE,
    )
    yield render(
        f"/etc/systemd/system/{UNIT}",
        "gateway-docker.service.j2",
        validate=VERIFY_UNIT,
        restarts=(UNIT,),
        description="inferfleet gateway (Docker)",
        user=USER,
        state=STATE,
        compose=COMPOSE,
        drain_timeout=settings["drain_timeout"],
        inside=[*DOCKER, "exec", "-T", "gateway"],
        command=["/bin/sh", "-c", f"{numbers} exec {up}"],
        **parts,
    )


def _installed() -> Ensure:
    """Whatever happened to the environment since."""
    return Ensure(
        "the gateway's environment is that of its wheels",
        test=sh("sh", SCRIPT, "--check"),
        run=f"{sh('systemctl', 'restart', SETUP)} && {sh('systemctl', 'reload-or-restart', UNIT)}",
        timeout=900,
    )


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """Names that mean nothing, wheels that are not there, and models nobody serves."""
    found = gateways.sources(step, plan)
    if not found:
        yield "hosts", "a gateway without backends: no deployment of the phase runs anywhere"
    yield from _models(step, found)
    yield from _keys(step, found)
    yield from _sources(step, plan)


def _models(step: Step, found: list[gateways.Source]) -> Iterator[tuple[str, str]]:
    served = gateways.models(found)
    names: dict[str, str] = {}
    for name, own in step.settings["models"].items():
        mine = [source for source in found if source.model == name]
        if not mine:
            yield "models", f"nobody serves '{name}'; served here: {', '.join(served)}"
        known = [source.said for source in mine]
        shadow = [own["shadow"]["pool"]] if "shadow" in own else []
        for unknown in [p for p in (*own.get("pools", ()), *shadow) if p not in known]:
            said = f"'{unknown}' does not serve '{name}'; {', '.join(known) or 'nobody'} does"
            yield "models", said
        if "pools" in own and not any(own["pools"].values()):
            yield "models", f"every pool of '{name}' has weight 0"
        for said in own.get("aliases", ()):
            other = said if said in served else names.setdefault(said, name)
            if other != name:
                yield "models", f"'{said}' of '{name}' is also a name of '{other}'"


def _keys(step: Step, found: list[gateways.Source]) -> Iterator[tuple[str, str]]:
    served = gateways.models(found)
    for name, _, limits in gateways.keys(step):
        for unknown in [model for model in limits.get("models", ()) if model not in served]:
            said = f"'{name}' may use '{unknown}', which nobody serves; served here: "
            yield "api_keys", said + ", ".join(served)


def _sources(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """Where the wheels come from."""
    settings = step.settings
    if "wheels" not in settings:
        return
    if "index_url" in settings:
        yield "index_url", "has no meaning beside `wheels`"
    folder = _folder(step, plan)
    if lacks := wheel.missing(folder, "tracing" if "tracing" in settings else ""):
        said = (
            f"{folder} lacks wheels of {', '.join(lacks)}: `python -m inferfleet.wheelhouse FOLDER`"
        )
        yield "wheels", f"{said} fetches all of them"


def warnings(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """Who reaches it, and models that the chosen engine does not serve."""
    settings = step.settings
    before = any(placement.role == "balancer" for placement in plan.phase.placements)
    if settings["listen"] == "public":
        yield "listen", "keys and prompts travel in clear: put the role balancer with tls before it"
    elif not before:
        said = "only its own host reaches it: no balancer of the phase is before it"
        yield "listen", f"{said}; add the role balancer, or say `listen: public`"
    if engine := gateways.ENGINES.get(settings.get("backend", "")):
        found = [s for s in gateways.sources(step, plan) if s.deployment]
        for name in gateways.models(found):
            engines = {s.deployment.engine for s in found if s.model == name and s.deployment}
            if engine not in engines:
                said = f"{engine} does not serve '{name}': {', '.join(sorted(engines))} does"
                yield "backend", said
    yield from _unknown_sizes(step, plan)


def _unknown_sizes(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """Clients guess a context that they are not told: the chat extension takes 128,000 tokens."""
    settings, found = step.settings, gateways.sources(step, plan)
    for name in gateways.models(found):
        can = gateways.can(gateways.asked(name, settings, found))
        told = "context_length" in settings["models"].get(name, {}) or can.context
        if not told and not can.embeddings:
            said = f"nothing says how many tokens the context of '{name}' has, and clients guess"
            yield "models", f"{said}: say `context_length` here or among the engine's options"


def ports(step: Step) -> Iterable[int]:
    """Where clients come in, and one private port for each worker."""
    settings = step.settings
    first = settings["private_port"]
    return [settings["port"], *range(first, first + settings["workers"])]
