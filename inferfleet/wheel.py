"""The gateway's wheel, made from this package's own files, and what it needs beside it. Pure."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import re
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from inferfleet import __version__
from inferfleet.roles import shipped

VERSION = __version__
DISTRIBUTION = "inferfleet_gateway"
FILE = f"{DISTRIBUTION}-{VERSION}-py3-none-any.whl"
PINS = shipped("roles") / "gateway" / "pins.txt"
_PACKAGE = Path(__file__).parent
_EXTRAS = {"": "gateway", "tracing": "gateway-tracing"}  # the wheel's extra -> ours
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first second a zip file knows


@cache
def gateway() -> bytes:
    """The wheel, the same bytes for the same files on every machine: stored, not compressed."""
    contents = dict(_contents())
    record = f"{DISTRIBUTION}-{VERSION}.dist-info/RECORD"
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
    about = f"{DISTRIBUTION}-{VERSION}.dist-info"
    yield f"{about}/METADATA", _metadata().encode()
    tags = "Root-Is-Purelib: true\nTag: py3-none-any\n"
    yield (
        f"{about}/WHEEL",
        f"Wheel-Version: 1.0\nGenerator: inferfleet {VERSION}\n{tags}".encode(),
    )


def _metadata() -> str:
    lines = [
        "Metadata-Version: 2.1",
        "Name: inferfleet-gateway",
        f"Version: {VERSION}",
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


def wanted(extra: str = "") -> list[str]:
    """All that an environment is made from: pip itself, and what the gateway names."""
    return [*requirements(), *(requirements(extra) if extra else ()), "pip"]


def missing(folder: Path, extra: str = "") -> list[str]:
    """Distributions that a folder of wheels lacks."""
    there = {name(path.name.partition("-")[0]) for path in folder.glob("*.whl")}
    return [each for each in map(name, wanted(extra)) if each not in there]
