"""Docker Engine and Compose, with a daemon.json of ours, or of nobody else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from inferfleet.builders import package, packages, repository, running
from inferfleet.model import Artefact, Ensure, Plan, Render, Step, sh

KIND = "service"
ORDER = 30  # after drivers, before whatever runs in containers
REHEARSABLE = False  # a rehearsal's simulators run without containers
UNIT = "docker.service"
CONFIG = "/etc/docker/daemon.json"
FIRST = "/var/lib/inferfleet/docker-daemon.json"  # what Docker was first started with
DROPIN = f"/etc/systemd/system/{UNIT}.d/50-inferfleet.conf"
PROXY = "/etc/inferfleet/docker/proxy.env"
DISTRIBUTION = ["docker.io"]
REPOSITORY = ["docker-ce", "docker-ce-cli", "containerd.io", "docker-compose-plugin"]
NVIDIA = {"nvidia": {"args": [], "path": "nvidia-container-runtime"}}

# `--validate` came with Docker 23; before, dockerd reads its file when it is started, and no sooner
_VALIDATE = """\
dockerd --help | grep -q -- --validate || exit 0
exec dockerd --validate --config-file "$1"
"""

_COMPOSE = """\
set -e
if ! command -v apt-get >/dev/null; then
  dnf install -y docker-compose-plugin || dnf install -y docker-compose
  exit
fi
export DEBIAN_FRONTEND=noninteractive
set -- $(apt-cache pkgnames docker-compose | grep -xE 'docker-compose-(v2|plugin)' | sort -r)
case $(apt-cache policy docker-compose | grep Candidate:) in
  *' 2.'*) set -- "$@" docker-compose;;
esac
if [ $# = 0 ]; then
  echo "this distribution has no Docker Compose 2: give the role a repository" >&2
  exit 1
fi
apt-get install -y --no-install-recommends "$1"
"""

# The package starts Docker, and engines' images are pulled, before any file of ours is in place:
# without this, not through the mirrors, and to where they should not lie.
_FIRST = """\
set -e
umask 022
mkdir -p {folder}
printf %s {content} >{config}.new
cp {config}.new {first}
mv {config}.new {config}
"""

_OURS = """\
if [ -e {config} ]; then
  grep -qF '"{config}"' /var/lib/inferfleet/current.json 2>/dev/null ||
    cmp -s {config} {first} ||
    echo '{digest}  {config}' | sha256sum -c --status
else
  case $(docker info -f '{{{{.LiveRestoreEnabled}}}} {{{{.ContainersRunning}}}}' 2>/dev/null) in
    ''|true*|*' 0') ;;
    *) exit 1;;
  esac
fi
"""

_NOT_OURS = """\
if [ -e {config} ]; then
  echo "{config} was written by others. Put what should stay of it under the role's" >&2
  echo "settings (daemon: takes every key), then move it away and provision again." >&2
else
  echo "Docker has to be restarted for its configuration, and would stop the containers" >&2
  echo "that run, since live-restore is off: stop them yourself, then provision again." >&2
fi
exit 1
"""


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """Packages, daemon.json, the proxy's drop-in, and a Docker that runs."""
    settings = step.settings
    config = _config(step, plan, render)
    yield _before_the_first_start(config)
    yield from _installed(settings)
    yield _ours_to_write(config)
    yield config
    if proxy := _proxy(settings):
        yield render(PROXY, "proxy.env.j2", mode=0o600, restarts=(UNIT,), proxy=proxy)
        yield render(DROPIN, "docker.conf.j2", restarts=(UNIT,), environment=PROXY)
    yield running(UNIT)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """What Docker would refuse, or what contradicts itself."""
    settings = step.settings
    source = settings.get("repository", {})
    if source and ("key" in source) == ("keyring" in source):
        yield (
            "repository",
            "give its public key: either `key`, its text, or `keyring`, a file there",
        )
    if "exec-opts" in settings["daemon"] and "cgroup_driver" in settings:
        yield "cgroup_driver", "is given by daemon: exec-opts, too: leave one of them out"
    if settings["live_restore"] and "swarm-default-advertise-addr" in settings["daemon"]:
        yield "live_restore", "Docker refuses it in swarm mode: set live_restore: false"


def warnings(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """What loses GPUs sooner or later."""
    if step.settings.get("cgroup_driver") == "systemd" and step.host.gpus and not _gpus(step, plan):
        yield (
            "cgroup_driver",
            "with `systemd`, containers that got GPUs by NVIDIA's hook lose them at each "
            "daemon-reload: place the nvidia role, too, and use CDI device names",
        )


def daemon(step: Step, plan: Plan) -> dict[str, Any]:
    """What daemon.json says."""
    settings = step.settings
    wanted: dict[str, Any] = {
        "live-restore": settings["live_restore"],
        "log-driver": "json-file",
        "log-opts": {"max-file": str(settings["log_files"]), "max-size": settings["log_size"]},
    }
    for option in ("registry_mirrors", "insecure_registries"):
        if settings[option]:
            wanted[option.replace("_", "-")] = settings[option]
    if "data_root" in settings:
        wanted["data-root"] = settings["data_root"]
    if "cgroup_driver" in settings:
        wanted["exec-opts"] = [f"native.cgroupdriver={settings['cgroup_driver']}"]
    if _gpus(step, plan):  # CDI is on by itself since Docker 28.2; 25 to 28.1 have to be told
        wanted |= {"features": {"cdi": True}, "runtimes": NVIDIA}
    return {**wanted, **settings["daemon"]}


def _gpus(step: Step, plan: Plan) -> bool:
    """Whether the nvidia role is on the host, too."""
    return any(each.role == "nvidia" for each in plan.steps[step.host.name])


def _config(step: Step, plan: Plan, render: Render) -> Artefact:
    return render(
        CONFIG,
        "daemon.json.j2",
        validate=("sh", "-c", _VALIDATE, "dockerd", "{path}"),
        restarts=(UNIT,),
        daemon=sorted(daemon(step, plan).items()),
    )


def _installed(settings: Mapping[str, Any]) -> Iterator[Ensure]:
    source = settings.get("repository")
    if source:
        yield repository("docker", source)
    names = settings.get("packages") or (REPOSITORY if source else DISTRIBUTION)
    yield packages("Docker Engine is installed", "command -v dockerd >/dev/null", names)
    if not source:
        yield package("docker-cli", "docker")  # from Debian 13 on, not with docker.io
    yield Ensure(
        "Docker Compose 2 is installed",
        test="docker compose version >/dev/null 2>&1",
        run=_COMPOSE,
        timeout=600,
        before=True,
    )


def _before_the_first_start(config: Artefact) -> Ensure:
    """Docker reads what is wanted when it is installed; later, its file is an artefact."""
    return Ensure(
        f"{CONFIG} is there before Docker is",
        test=f"[ -e {CONFIG} ] || command -v dockerd >/dev/null",
        run=_FIRST.format(
            folder=CONFIG.rpartition("/")[0],
            config=CONFIG,
            first=FIRST,
            content=sh(config.content.decode()),
        ),
        before=True,
    )


def _ours_to_write(config: Artefact) -> Ensure:
    """Nobody else's daemon.json is overwritten, and nobody's containers are stopped by surprise."""
    digest = hashlib.sha256(config.content).hexdigest()
    return Ensure(
        f"{CONFIG} is ours to write",
        test=_OURS.format(config=CONFIG, first=FIRST, digest=digest),
        run=_NOT_OURS.format(config=CONFIG),
        before=True,
    )


def _proxy(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Docker's variables for proxies; their addresses may hold passwords."""
    given = settings.get("proxy", {})
    found = [(f"{n.upper()}_PROXY", given[n]) for n in ("http", "https") if n in given]
    if found and given["except"]:
        found.append(("NO_PROXY", ",".join(given["except"])))
    return found
