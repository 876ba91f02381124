"""Weights on disk before any engine starts: one writer, manifests, and mounts that give up well.

What is done on a host is one program, models.py; engines ask it whether their model is complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from inferfleet.builders import VERIFY_UNIT, running, system_user
from inferfleet.model import Artefact, Ensure, Host, Model, Plan, Render, Step, sh
from inferfleet.modelpath import (
    FETCH_UNIT,
    PROGRAM,
    ROLE,
    STAGE_UNIT,
    escaped,
    fetches,
    folder_name,
    models,
    mounts,
)

KIND = "service"
ORDER = 40  # before the engines
REHEARSABLE = False  # a rehearsal's simulators read no weights
FOLDER = "/etc/inferfleet/model_cache"
UNITS = "/etc/systemd/system"
USER = "inferfleet-models"
STATE = "/var/lib/inferfleet"  # what the applier remembers

# hard: a read waits for a server that is away instead of failing in the middle of loading;
# retry=0: a mount that fails says so at once; lookupcache: a model is seen as soon as it is there.
_OPTIONS = "nfsvers=4.2,proto=tcp,hard,timeo=600,retrans=2,retry=0,noatime,nodev,nosuid,noexec"
_LARGE = "rsize=1048576,wsize=1048576,lookupcache=positive,_netdev"

_NFS = """\
set -e
if command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  set -- apt-get install -y --no-install-recommends {debian}
  "$@" || {{ apt-get update && "$@"; }}
else
  dnf install -y nfs-utils
fi
"""

_START = """\
systemctl enable -q {unit}
systemctl reset-failed {unit} 2>/dev/null
# one that waits to be tried again would make start wait, too; one that runs is joined
[ "$(systemctl show -p SubState --value {unit})" != auto-restart ] || systemctl stop {unit}
journalctl -u {unit} -f -n 0 -o cat & shows=$!
systemctl start {unit}; status=$?
kill $shows
[ $status = 0 ] || {{ journalctl -u {unit} -n 15 --no-pager -o cat >&2; exit 1; }}
"""


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """The program everywhere; then what the host is: writer, reader, or both for itself."""
    yield render.copy(PROGRAM, "models.py", mode=0o755)
    if fetches(step):
        yield system_user(USER)
    if not mounts(step):
        yield _directory(step.settings["path"])
    if mounts(step):
        yield from _mounted(step, plan, render)
    elif readers(step, plan):  # before the fetching, which may take hours
        yield from _exported(step, plan, render)
    if fetches(step):
        yield from _fetching(step, plan, render)
    else:
        own = folders(step.settings["path"], wanted(step, plan))
        yield from _awaited(own, step.settings["timeout"])
    if "staging" in step.settings and wanted(step, plan):
        yield from _staged(step, plan, render)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """One writer, which is there; models pinned; folders apart."""
    settings, writer = step.settings, step.settings.get("writer")
    here = cache_hosts(plan)
    if writer and writer not in [host.name for host in here]:
        names = ", ".join(host.name for host in here) or "none"
        yield "writer", f"'{writer}' is not among the role's hosts ({names}); add it there"
    if "share" in settings and not writer:
        yield "share", "somebody has to fill the share: name the one host that does as `writer`"
    staging, path = settings.get("staging"), settings["path"]
    for other, name in ((path, "path"), (settings.get("directory"), "directory")):
        if staging and other and inside(staging, other):
            yield "staging", f"{staging} and {name} {other} must not lie in one another"
    if any(inside(used, STATE) for used in (staging, path) if used):
        yield (
            "staging" if staging else "path",
            f"{STATE} is root's alone: engines cannot read there",
        )
    if settings.get("directory") and inside(settings["directory"], path):
        yield "directory", f"{settings['directory']} and path {path} must not lie in one another"
    for model in models(plan.instances()):
        if not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
            said = f"model '{model.name}' needs a revision, the commit's 40 digits"
            yield "hosts", f"{said}: a branch would change under a running fleet"


def inside(one: str, other: str) -> bool:
    """Whether one of two folders is, or holds, the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def cache_hosts(plan: Plan) -> list[Host]:
    """Every host of the phase with this role."""
    named = [p.hosts for p in plan.phase.placements if p.role == ROLE]
    return [host for host in plan.hosts if any(host.name in hosts for hosts in named)]


def readers(step: Step, plan: Plan) -> list[Host]:
    """Hosts to which the step's host exports its models."""
    if step.settings.get("writer") != step.host.name:
        return []
    return [host for host in cache_hosts(plan) if host.name != step.host.name]


def wanted(step: Step, plan: Plan, *, own: bool = True) -> tuple[Model, ...]:
    """The models the step's host needs, or has to fetch: a writer those of all hosts it serves."""
    if own or "writer" not in step.settings:
        return models(i for i in plan.instances() if i.host.name == step.host.name)
    names = {host.name for host in cache_hosts(plan)}
    return models(i for i in plan.instances() if i.host.name in names)


def folders(path: str, found: tuple[Model, ...]) -> list[str]:
    """Where models lie under a path."""
    return [f"{path}/{folder_name(model)}" for model in found]


def entries(found: tuple[Model, ...]) -> list[dict[str, str | None]]:
    """Models as models.py reads them."""
    return [
        {
            "name": model.name,
            "folder": folder_name(model),
            "repository": model.repository,
            "revision": model.revision,
        }
        for model in found
    ]


def source(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where models.py fetches from."""
    if "directory" in settings:
        return {"directory": settings["directory"]}
    command = f"{_venv(settings)}/bin/hf"
    kept = {key: settings[key] for key in ("endpoint", "exclude")}
    return {**kept, "command": command}


def _fetching(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    settings, found = step.settings, wanted(step, plan, own=False)
    path = settings["path"]
    if "directory" not in settings:
        yield from _downloader(settings)
    token = settings.get("token")
    if token:
        yield render.copy(f"{FOLDER}/token", token, mode=0o600)
    config = f"{FOLDER}/models.json"
    yield render(
        config,
        "models.json.j2",
        validate=("python3", "-m", "json.tool", "{path}", "/dev/null"),
        target=path,
        source=source(settings),
        models=entries(found),
        reserve=settings["reserve_gib"],
        prune=False,
    )
    yield render(
        f"{UNITS}/{FETCH_UNIT}",
        "fetch.service.j2",
        validate=VERIFY_UNIT,
        description="inferfleet: fetch models",
        command=["/usr/bin/python3", "-I", PROGRAM, "fetch", config],
        user=USER,
        written=path,
        local="share" not in settings,
        after=f"{escaped(path)}.automount" if "share" in settings else "",
        token=f"{FOLDER}/token" if token else "",
    )
    yield _complete(FETCH_UNIT, folders(path, found), settings["timeout"])


def _downloader(settings: Mapping[str, Any]) -> Iterator[Ensure]:
    """`hf` in an environment of its own, so that no engine's dependencies meet it."""
    venv, version = _venv(settings), settings["hub_version"]
    yield Ensure(
        f"huggingface_hub {version} is installed in {venv}",
        test=f"{sh(f'{venv}/bin/hf')} version 2>/dev/null | grep -qwF {sh(version)}",
        run="python3 -c 'import ensurepip' 2>/dev/null || { "
        + _NFS.format(debian="python3-venv").replace("nfs-utils", "python3")
        + "}\n"
        + f"{sh('python3', '-m', 'venv', '--clear', venv)} && "
        + sh(f"{venv}/bin/pip", "install", "--quiet", f"huggingface_hub=={version}"),
        timeout=900,
        before=True,
    )


def _venv(settings: Mapping[str, Any]) -> str:
    return f"/opt/inferfleet/hf-{settings['hub_version']}"


def _directory(path: str, owner: str = USER) -> Ensure:
    return Ensure(
        f"{path} belongs to {owner}",
        test=f'[ "$(stat -c %U {sh(path)} 2>/dev/null)" = {sh(owner)} ]',
        run=sh("install", "-d", "-m", "0755", "-o", owner, path),
        before=True,
    )


def _complete(unit: str, wanted: list[str], timeout: int) -> Ensure:
    """The unit is enabled, and what it fetches is complete; started again, it goes on."""
    enabled = f"systemctl is-enabled -q {sh(unit)}"
    test = f"{enabled} && {_checked(wanted)}" if wanted else enabled
    names = ", ".join(path.rpartition("/")[2].partition("@")[0] for path in wanted) or "none"
    what = "staged" if unit == STAGE_UNIT else "complete"
    return Ensure(f"models are {what}: {names}", test, _START.format(unit=sh(unit)), timeout)


def _awaited(wanted: list[str], timeout: int) -> Iterator[Ensure]:
    """The writer, provisioned at the same time, makes the models complete."""
    if wanted:
        names = ", ".join(path.rpartition("/")[2].partition("@")[0] for path in wanted)
        yield Ensure(f"models are complete on the share: {names}", _checked(wanted), "", timeout)


def _checked(wanted: list[str]) -> str:
    """A dead server makes a hard mount wait for ever: not the test."""
    return sh("timeout", "-k", "1", "20", "python3", "-I", PROGRAM, "check", *wanted)


def _mounted(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """The share, mounted when it is first looked at; a server that is away delays no boot."""
    settings = step.settings
    path, name = settings["path"], escaped(settings["path"])
    yield _nfs("nfs-common", "mount.nfs")
    unit = f"{name}.automount"
    yield render(
        f"{UNITS}/{name}.mount",
        "share.mount.j2",
        validate=VERIFY_UNIT,
        restarts=(unit,),
        what=settings.get("share") or f"{_bracketed(_address(plan, settings))}:{path}",
        where=path,
        options=",".join(mount_options(step)),
    )
    yield render(
        f"{UNITS}/{unit}",
        "share.automount.j2",
        validate=VERIFY_UNIT,
        restarts=(unit,),
        where=path,
    )
    yield running(unit)


def mount_options(step: Step) -> list[str]:
    """Read-only for all but the writer."""
    access = "rw" if fetches(step) else "ro"
    return [access, *_OPTIONS.split(","), f"nconnect={step.settings['connections']}", _LARGE]


def _address(plan: Plan, settings: Mapping[str, Any]) -> str:
    """Where readers reach the writer; empty while the check has yet to say that it is not there."""
    found = [host.private_address for host in plan.hosts if host.name == settings.get("writer")]
    return found[0] if found else ""


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _nfs(debian: str, command: str) -> Ensure:
    return Ensure(
        f"package {debian} is installed",
        test=f"PATH=$PATH:/usr/sbin:/sbin command -v {sh(command)} >/dev/null",
        run=_NFS.format(debian=debian),
        timeout=600,
        before=True,
    )


def _exported(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    yield _nfs("nfs-kernel-server", "exportfs")
    yield render(
        "/etc/exports.d/inferfleet-models.exports",
        "models.exports.j2",
        reloads=("nfs-server.service",),
        path=step.settings["path"],
        clients=[host.private_address for host in readers(step, plan)],
    )
    yield running("nfs-server.service")


def _staged(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """A copy on the host's own disk: the same program, with the cache as its source."""
    settings, found = step.settings, wanted(step, plan)
    staging, config = settings["staging"], f"{FOLDER}/staging.json"
    yield _directory(staging, owner="root")
    yield render(
        config,
        "models.json.j2",
        validate=("python3", "-m", "json.tool", "{path}", "/dev/null"),
        target=staging,
        source={"directory": settings["path"]},
        models=entries(found),
        reserve=settings["reserve_gib"],
        prune=True,
    )
    yield render(
        f"{UNITS}/{STAGE_UNIT}",
        "fetch.service.j2",
        validate=VERIFY_UNIT,
        description="inferfleet: copy models to the local disk",
        command=["/usr/bin/python3", "-I", PROGRAM, "fetch", config],
        user="",
        written=staging,
        local=True,
        after=f"{escaped(settings['path'])}.automount" if mounts(step) else FETCH_UNIT,
        token="",
    )
    yield _complete(STAGE_UNIT, folders(staging, found), settings["timeout"])
