"""GPUs made usable: driver, container toolkit with CDI, persistence, fabric manager, MIG slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from inferfleet.builders import VERIFY_UNIT, packages, repository, running
from inferfleet.facts.drivers import Version, needed, number
from inferfleet.model import Artefact, Ensure, Plan, Render, Step, sh

KIND = "service"
ORDER = 20  # before Docker, which looks for what is installed here
REHEARSABLE = False
UNIT = "inferfleet-gpus.service"
PROGRAM = "/opt/inferfleet/nvidia/gpus.py"
CONFIG = "/etc/inferfleet/nvidia/gpus.json"

# what it complains of, nvidia-smi prints to its output, too
_DRIVER = (
    "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | "
    "grep -m 1 -xE '[0-9.]+')"
)
_NEW_ENOUGH = f"""\
have={_DRIVER} && [ -n "$have" ] &&
  [ "$(printf '%s\\n' {{least}} "$have" | sort -V | head -n 1)" = {{least}} ]
"""
_TOO_OLD = f"""\
have={_DRIVER}
echo "the driver is ${{{{have:-not here, or does not work}}}}; {{because}}" >&2
echo "install driver {{least}} or newer (driver: packages does), or an older engine" >&2
exit 1
"""
_REBOOT = """
modprobe nvidia || true
nvidia-smi >/dev/null && exit
echo 'the driver is installed: reboot, then provision again' >&2
exit 1
"""

# what belongs to the driver, under each name that Debian, Ubuntu and NVIDIA have for it
_OWN = (
    "dpkg-query -W -f '${db:Status-Abbrev}${Package}\\n' | sed -n 's/^[hi]i *//p' | "
    "grep -E '^(lib)?(nvidia|cuda-drivers)' | grep -v container"
)
_MARK = f"""\
mark() {{
  ! command -v apt-mark >/dev/null || {_OWN} | xargs -r apt-mark "$1" >/dev/null
}}
"""
_HOLD_AFTERWARDS = "trap 'mark hold' EXIT\n"
_HELD = f"""\
! command -v apt-mark >/dev/null || {{
  held=$(apt-mark showhold)
  {_OWN} | while read -r p; do echo "$held" | grep -qx "$p" || exit 1; done
}}
"""

_SWITCHES = "/proc/driver/nvidia-nvswitch/devices"
_FABRIC = f"""\
[ -z "$(ls {_SWITCHES} 2>/dev/null)" ] || {{
  [ "$(nv-fabricmanager --version 2>/dev/null | grep -o '[0-9][0-9.]*$')" = "{_DRIVER}" ] &&
    systemctl is-active -q nvidia-fabricmanager && systemctl is-enabled -q nvidia-fabricmanager
}}
"""
_FABRIC_INSTALL = f"""\
driver={_DRIVER} && [ -n "$driver" ]
branch=${{driver%%.*}}
if command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update
  # one of another branch has to go, and none that is held does
  apt-mark showhold | grep '^nvidia-fabric' | xargs -r apt-mark unhold
  for name in nvidia-fabricmanager-$branch nvidia-fabricmanager; do
    apt-get install -y --allow-downgrades --allow-change-held-packages "$name=$driver*" && break
  done
else
  dnf install -y "nvidia-fabricmanager-$driver" || dnf install -y "nvidia-fabric-manager-$driver"
fi
systemctl enable -q nvidia-fabricmanager && systemctl restart nvidia-fabricmanager
"""


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """Driver and toolkit first; then a program that readies the GPUs at every boot, and now."""
    settings = step.settings
    if source := settings.get("repository"):
        yield repository("nvidia", source)
    yield from _driver(step, plan)
    if settings["toolkit"]:
        yield _toolkit()
    yield render.copy(PROGRAM, "gpus.py", mode=0o755, restarts=(UNIT,))
    yield render(CONFIG, "gpus.json.j2", restarts=(UNIT,), settings=wanted(step))
    yield render(
        f"/etc/systemd/system/{UNIT}",
        "gpus.service.j2",
        validate=VERIFY_UNIT,
        restarts=(UNIT,),
        command=["/usr/bin/python3", "-I", PROGRAM, "prepare", CONFIG],
    )
    if settings["fabric_manager"] == "auto":
        yield Ensure("the fabric manager is the driver's", _FABRIC, _FABRIC_INSTALL, 900)
    if settings["driver"]["hold"]:
        yield Ensure("the driver's packages are held back", _HELD, f"{_MARK}mark hold")
    yield running(UNIT)
    yield _ready()


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """There are GPUs, and every one can be named."""
    name, source = step.host.name, step.settings.get("repository", {})
    if not step.host.gpus:
        yield "hosts", f"{name} has no GPUs in the inventory: leave it out here"
    if source and ("key" in source) == ("keyring" in source):
        yield (
            "repository",
            "give its public key: either `key`, its text, or `keyring`, a file there",
        )
    for gpu in step.host.gpus:
        if " MIG " in gpu.model and not gpu.mig:
            model, _, profile = gpu.model.partition(" MIG ")
            said = (
                f"{name}: say which GPU the slice is of: {{model: {model}, mig: [{profile}, ...]}}"
            )
            yield "hosts", said
    slices = {gpu.index for gpu in step.host.gpus if gpu.mig}
    for each in plan.steps[name]:
        for instance in each.instances:
            if slices & set(instance.gpus) and instance.options.get("runtime") == "native":
                yield "hosts", f"{instance.name} on {name}: MIG slices are for containers only"


def least(step: Step, plan: Plan) -> tuple[Version, str]:
    """The oldest driver that will do for the host's engines and the settings, and why."""
    given = step.settings["driver"].get("minimum", "")
    found = [(number(given), f"{given} is the inventory's minimum")] if given else []
    for other in plan.steps[step.host.name]:
        for instance in other.instances:
            need = needed(other.role, str(instance.options.get("version", "")))
            if need and instance.gpus:
                found.append((need.oldest, need.because))
    return max(found, default=((), "engines need one"))


def padded(version: Version) -> str:
    """As the driver itself writes it, its third number with two digits; sort -V minds."""
    return ".".join(f"{n:02}" if place == 2 else str(n) for place, n in enumerate(version)) or "0"


def wanted(step: Step) -> dict[str, Any]:
    """What gpus.py is to see to: MIG profiles by GPU, and the names containers ask for."""
    slices: dict[str, list[str]] = {}
    for gpu in step.host.gpus:
        if gpu.mig:
            slices.setdefault(gpu.name.partition(":")[0], []).append(gpu.mig)
    return {
        "devices": [gpu.name for gpu in step.host.gpus] if step.settings["toolkit"] else [],
        "mig": slices,
        "persistence": step.settings["persistence"],
    }


def _driver(step: Step, plan: Plan) -> Iterator[Ensure]:
    oldest, because = least(step, plan)
    settings, version = step.settings["driver"], padded(oldest)
    title = f"NVIDIA driver {version} or newer works" if oldest else "the NVIDIA driver works"
    test = _NEW_ENOUGH.format(least=version)
    if settings["packages"]:
        installed = packages(title, test, settings["packages"])
        hold = _HOLD_AFTERWARDS if settings["hold"] else ""
        run = f"{_MARK}{hold}mark unhold\n{installed.run}{_REBOOT}"
        yield Ensure(title, test, run, installed.timeout, before=True)
    else:
        yield Ensure(title, test, _TOO_OLD.format(least=version, because=because), before=True)


def _toolkit() -> Ensure:
    test, title = "command -v nvidia-ctk >/dev/null", "NVIDIA's container toolkit is installed"
    return packages(title, test, ["nvidia-container-toolkit"])


def _ready() -> Ensure:
    return Ensure(
        "GPUs are as the inventory says, and containers can ask for them",
        test=sh("python3", "-I", PROGRAM, "check", CONFIG),
        run=f"systemctl restart {UNIT} || {{ journalctl -u {UNIT} -n 9 --no-pager; false; }}",
        timeout=300,
    )
