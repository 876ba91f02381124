"""The gateway's wheel, made from this package's own files, and the wheels it needs.

`python -m inferfleet.wheel FOLDER` fetches the latter, for gateways that reach no package index.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import io
import platform
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from inferfleet import __version__
from inferfleet.errors import Error
from inferfleet.roles import shipped

DISTRIBUTION = "inferfleet_gateway"
FILE = f"{DISTRIBUTION}-{__version__}-py3-none-any.whl"
PINS = shipped("roles") / "gateway" / "pins.txt"
_PACKAGE = Path(__file__).parent
_EXTRAS = {"": "gateway", "tracing": "gateway-tracing"}  # the wheel's extra -> ours
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first second a zip file knows
_GLIBC = ("2_34", "2_28", "2_17")  # what hosts with a Python of 3.11 or newer have at least


@cache
def gateway() -> bytes:
    """The wheel, the same bytes for the same files on every machine: stored, not compressed."""
    contents = dict(_contents())
    record = f"{DISTRIBUTION}-{__version__}.dist-info/RECORD"
    lines = [f"{path},{_digest(data)},{len(data)}" for path, data in contents.items()]
    contents[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as written:
        for path, data in contents.items():
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.create_system = 3  # Unix, wherever it is made
            entry.external_attr = 0o100644 << 16
            written.writestr(entry, data)
    return archive.getvalue()


def _contents() -> Iterator[tuple[str, bytes]]:
    """Path in the wheel and content, sorted; the package, then what describes it."""
    folder = _PACKAGE / "gateway"
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"inferfleet/gateway/{path.relative_to(folder).as_posix()}", path.read_bytes()
    about = f"{DISTRIBUTION}-{__version__}.dist-info"
    yield f"{about}/METADATA", _metadata().encode()
    tags = "Root-Is-Purelib: true\nTag: py3-none-any\n"
    yield (
        f"{about}/WHEEL",
        f"Wheel-Version: 1.0\nGenerator: inferfleet {__version__}\n{tags}".encode(),
    )


def _metadata() -> str:
    lines = [
        "Metadata-Version: 2.1",
        "Name: inferfleet-gateway",
        f"Version: {__version__}",
        "Summary: One address for every client and every inference engine.",
        "Requires-Python: >=3.11",
        *(f"Requires-Dist: {wanted}" for wanted in requirements()),
    ]
    for extra in filter(None, _EXTRAS):
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {w}; extra == "{extra}"' for w in requirements(extra)]
    return "\n".join(lines) + "\n"


def requirements(extra: str = "") -> list[str]:
    """What the gateway needs, with ranges: from pyproject.toml in a clone, else as installed."""
    ours = _EXTRAS[extra]
    project = _PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        found = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"]
        every = found.get(ours, [])
    else:
        marked = importlib.metadata.requires("inferfleet") or []
        of_extra = re.compile(rf"extra == ['\"]{ours}['\"]")
        every = [line.partition(";")[0].strip() for line in marked if of_extra.search(line)]
    return sorted(wanted for wanted in every if not wanted.startswith("inferfleet"))


def _digest(data: bytes) -> str:
    raw = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return f"sha256={raw.decode().rstrip('=')}"


def name(requirement: str) -> str:
    """The distribution that a requirement names, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement)[0]).lower()


def missing(folder: Path, extra: str = "") -> list[str]:
    """Distributions that a folder of wheels lacks: pip itself, and what the gateway names."""
    there = {name(path.name.partition("-")[0]) for path in folder.glob("*.whl")}
    wanted = [*requirements(), *(requirements(extra) if extra else ()), "pip"]
    return [each for each in dict.fromkeys(map(name, wanted)) if each not in there]


def download(folder: Path, python: str, machine: str, extra: str = "") -> None:
    """Have in `folder` all wheels a gateway needs on hosts with that Python and machine.

    Raises Error with the last lines of pip, which is configured as on any machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_{version}_{machine}" for version in _GLIBC]
    wanted = [*requirements(), *(requirements(extra) if extra else ()), "pip"]
    argv = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"),
        *(f"--python-version={python}", *platforms, "--constraint", str(PINS)),
        *("--dest", str(folder), *wanted),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise Error(f"pip download failed:\n{last}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m inferfleet.wheel", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=platform.python_version(), help="of the gateways")
    parser.add_argument("--machine", default=platform.machine(), help="x86_64 or aarch64")
    parser.add_argument("--tracing", action="store_true", help="OpenTelemetry, too")
    given = parser.parse_args(argv)
    version = ".".join(given.python.split(".")[:2])
    try:
        download(given.folder, version, given.machine, "tracing" if given.tracing else "")
    except Error as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(list(given.folder.glob('*.whl')))} wheels in {given.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
