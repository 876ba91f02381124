"""Readies a host's GPUs, at every boot; runs there with the standard library of Python 3.8.

gpus.py prepare CONFIG   persistence, MIG slices, /dev/char links, CDI names; may be run any time
gpus.py check CONFIG     whether all is as CONFIG says; exit status 1 and a line for each fault
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from shutil import which
from typing import Any

# where nvidia-cdi-refresh writes, too; it goes before what somebody left in /etc/cdi
SPEC = "/var/run/cdi/nvidia.yaml"


class Wrong(Exception):
    """Something a person has to look after; the text says what."""


def prepare(config: dict[str, Any]) -> None:
    """Make GPUs as the configuration says. Raises Wrong."""
    run("nvidia-smi", "-L")  # also loads the driver's modules and makes its device nodes
    if config["persistence"]:
        run("nvidia-smi", "-pm", "1")
    for gpu, profiles in config["mig"].items():
        slice_up(gpu, profiles)
    if which("nvidia-ctk"):
        # where runc passes devices on to systemd by these names: 1.1.3 to 1.1.6
        run("nvidia-ctk", "system", "create-dev-char-symlinks", "--create-all")
        Path(SPEC).parent.mkdir(parents=True, exist_ok=True)
        run("nvidia-ctk", "cdi", "generate", f"--output={SPEC}")


def faults(config: dict[str, Any]) -> list[str]:
    """What is not as the configuration says."""
    found = []
    has = slices(run("nvidia-smi", "-L"))
    for gpu, profiles in config["mig"].items():
        if has.get(gpu, []) != profiles:
            found.append(f"GPU {gpu} has the slices {has.get(gpu)}, not {profiles}")
    if config["devices"]:
        listed = run("nvidia-ctk", "cdi", "list").split()
        names = [f"nvidia.com/gpu={device}" for device in config["devices"]]
        found += [f"no CDI device {name}" for name in names if name not in listed]
    return found


def slice_up(gpu: str, profiles: list[str]) -> None:
    """Make the slices of a GPU that has none; never touches any that are there."""
    has = slices(run("nvidia-smi", "-L"))
    if gpu not in has:
        raise Wrong(f"there is no GPU {gpu}")
    if not has[gpu]:
        run("nvidia-smi", "-i", gpu, "-mig", "1")
        run("nvidia-smi", "mig", "-i", gpu, "-cgi", ",".join(profiles), "-C")
        has = slices(run("nvidia-smi", "-L"))
    if sorted(has[gpu]) != sorted(profiles):
        raise Wrong(
            f"GPU {gpu} is cut in {', '.join(has[gpu])}, wanted are {', '.join(profiles)}. Stop "
            f"what uses it, then: nvidia-smi mig -i {gpu} -dci; nvidia-smi mig -i {gpu} -dgi"
        )
    if has[gpu] != profiles:
        raise Wrong(f"GPU {gpu} counts its slices otherwise: write mig: [{', '.join(has[gpu])}]")


def slices(listed: str) -> dict[str, list[str]]:
    """MIG profiles by GPU, in the order of `nvidia-smi -L`; no profiles for a whole GPU."""
    found: dict[str, list[str]] = {}
    for gpu, profile in re.findall(r"^GPU (\d+):|^ +MIG (\S+) +Device", listed, re.MULTILINE):
        if gpu:
            found[gpu] = []
        else:
            found[list(found)[-1]].append(profile)
    return found


def run(*argv: str) -> str:
    """What a command printed. Raises Wrong when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-1000:]
        raise Wrong(f"{' '.join(argv)}: exit status {done.returncode}: {said}")
    return done.stdout


def main(verb: str, path: str) -> int:
    config = json.loads(Path(path).read_text("utf-8"))
    try:
        if verb == "prepare":
            prepare(config)
            return 0
        found = faults(config)
    except (Wrong, OSError, subprocess.TimeoutExpired) as error:
        found = [str(error)]
    sys.stderr.write("".join(f"{fault}\n" for fault in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
