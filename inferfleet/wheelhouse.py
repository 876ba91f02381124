"""`python -m inferfleet.wheelhouse FOLDER` fetches the wheels of gateways that reach no index."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from inferfleet import wheel
from inferfleet.errors import Error

_GLIBC = ("2_34", "2_28", "2_17")  # what hosts with a Python of 3.11 or newer have at least


def fill(folder: Path, python: str, machine: str, extra: str = "", retries: int = 5) -> None:
    """Have in `folder` all wheels a gateway needs on hosts with that Python and machine.

    Raises Error with the last lines of pip, which is configured as on any machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    argv = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"),
        f"--retries={retries}",
        *(f"--platform=manylinux_{version}_{machine}" for version in _GLIBC),
        *(f"--python-version={python}", "--constraint", str(wheel.PINS)),
        *("--dest", str(folder), *wheel.wanted(extra)),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise Error(f"pip download failed:\n{last}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 when pip finds no wheels."""
    parser = argparse.ArgumentParser(prog="python -m inferfleet.wheelhouse", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=platform.python_version(), help="of the gateways")
    parser.add_argument("--machine", default=platform.machine(), help="x86_64 or aarch64")
    parser.add_argument("--tracing", action="store_true", help="OpenTelemetry, too")
    given = parser.parse_args(argv)
    version = ".".join(given.python.split(".")[:2])
    try:
        fill(given.folder, version, given.machine, "tracing" if given.tracing else "")
    except Error as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(list(given.folder.glob('*.whl')))} wheels in {given.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
