"""Send the collector to a host and read what it says: one round trip, nothing is left behind."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from inferfleet import transport, wire
from inferfleet.errors import ApplyError
from inferfleet.facts.document import Facts, parse
from inferfleet.facts.onhost.collect import MARK
from inferfleet.model import Host
from inferfleet.probe import framed

PATIENCE = 120.0  # seconds; a hung driver can keep NVML waiting

# In the order they are loaded. PEP 366 names let each import the earlier ones as it does here.
_MODULES = ("processes", "gpus", "machine", "containers", "network", "collect")
_PACKAGE = "inferfleet.facts.onhost"
_LOAD = """import sys, types
for name in ("inferfleet", "inferfleet.facts", "inferfleet.facts.onhost"):
    sys.modules[name] = types.ModuleType(name)
def load(name, source):
    module = sys.modules["inferfleet.facts.onhost." + name] = types.ModuleType(name)
    setattr(sys.modules["inferfleet.facts.onhost"], name, module)
    exec(compile(source, name, "exec"), module.__dict__)
    return module
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask beyond what is always asked.

    `reach`: name:port pairs to connect to. `sizes`: name -> paths to add up in bytes.
    """

    reach: Sequence[str] = ()
    sizes: Mapping[str, Sequence[str]] = field(default_factory=dict)


@functools.cache
def program() -> bytes:
    """The collector and nvidia-ml-py's one file, as one Python source that unpacks itself."""
    folder = resources.files(_PACKAGE)
    parts = [_LOAD]
    for name in _MODULES:
        parts.append(f"load({name!r}, {folder.joinpath(name + '.py').read_text('utf-8')!r})\n")
    parts.append(f"sys.modules['{_PACKAGE}.gpus'].BINDING = {_binding()!r}\n")
    parts.append(f"sys.modules['{_PACKAGE}.collect'].main()\n")
    packed = zlib.compress("".join(parts).encode(), 9)
    head = f"import sys,zlib;exec(zlib.decompress(sys.stdin.buffer.read({len(packed)})))\n"
    return framed("python", head.encode()) + packed


def _binding() -> str:
    found = importlib.util.find_spec("pynvml")
    if found is None or found.origin is None:
        return ""
    return Path(found.origin).read_text("utf-8")


def collect(host: Host, options: transport.Options, request: Request | None = None) -> Facts:
    """A host's facts, over a connection of their own. Raises HostError."""
    with transport.connect(host, options) as way:
        return collect_over(way, request)


def collect_over(way: transport.Transport, request: Request | None = None) -> Facts:
    """A host's facts, over a connection that is open already. Raises HostError."""
    asked = json.dumps(dataclasses.asdict(request or Request())).encode() + b"\n"
    with way.start(wire.BOOTSTRAP) as session:
        session.send(program() + asked)
        answer = _answer(way.host.name, session, session.lines(timeout=PATIENCE))
        arrived = time.time()
    return _facts(way.host.name, answer, arrived)


def _answer(host: str, session: transport.Session, lines: Iterable[bytes]) -> bytes:
    for line in lines:
        if line.startswith(MARK.encode()):
            return line[len(MARK) :]
    status, last = session.wait(timeout=PATIENCE), session.errors.strip().splitlines()[-1:]
    if status == 127:
        raise ApplyError(host, "it has no python3; install it (Debian: python3-minimal)")
    raise ApplyError(host, f"it did not tell its facts: {''.join(last) or f'status {status}'}")


def _facts(host: str, answer: bytes, arrived: float) -> Facts:
    try:
        data = json.loads(answer)
        return parse({**data, "host": host, "clock_offset": data["time"] - arrived})
    except (ValueError, KeyError, TypeError) as error:
        raise ApplyError(host, f"its facts cannot be read: {error}") from error
