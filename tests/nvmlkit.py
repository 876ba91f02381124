"""The stand-in for libnvidia-ml.so.1, compiled when first asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FIXTURES = Path(__file__).with_name("nvml")


def build(folder: Path) -> Path:
    """Compile nvml.c into `folder`; skips by name without a compiler, fails where one is due."""
    compiler = shutil.which("cc")
    if compiler is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs a C compiler (cc)")
    source, target = FIXTURES / "nvml.c", folder / "libnvidia-ml.so.1"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    argv = [compiler, *warnings, "-shared", "-fPIC", "-o", str(target), str(source)]
    subprocess.run(argv, check=True, timeout=60)
    return target


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the library, for LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("nvml")
    build(folder)
    return folder
