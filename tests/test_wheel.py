"""The gateway's wheel: the same bytes anywhere, what pip takes, and nothing of the rest."""

import ast
import email
import io
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from inferfleet import wheel, wheelhouse

ROOT = Path(__file__).parent.parent
ABOUT = "inferfleet_gateway-0.1.0.dist-info"


@pytest.fixture(scope="module")
def made():
    return zipfile.ZipFile(io.BytesIO(wheel.gateway()))


def elsewhere(folder, script, **more):
    """What a fresh Python prints that knows only what lies in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **more},
        cwd=folder,
        capture_output=True,
        timeout=60,
        check=True,
    )
    return done.stdout


PRINT = "import sys; from inferfleet import wheel; sys.stdout.buffer.write(wheel.gateway())"


def test_a_copy_with_other_dates_and_another_seed_makes_the_same_bytes(tmp_path):
    shutil.copytree(ROOT / "inferfleet", tmp_path / "inferfleet", copy_function=shutil.copyfile)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    (tmp_path / "roles").mkdir()
    assert elsewhere(tmp_path, PRINT, PYTHONHASHSEED="7", TZ="Asia/Tokyo") == wheel.gateway()


def test_an_installed_package_makes_the_same_bytes_as_a_clone(tmp_path):
    shutil.copytree(ROOT / "inferfleet", tmp_path / "inferfleet")
    about = tmp_path / "inferfleet-0.1.0.dist-info"
    about.mkdir()
    extras = {extra: wheel.requirements(extra) for extra in ("", "tracing")}
    lines = [
        f"Requires-Dist: {wanted}; extra == 'gateway{extra and '-' + extra}'"
        for extra, every in extras.items()
        for wanted in every
    ]
    lines += ["Requires-Dist: rich>=13", "Requires-Dist: ruff; extra == 'dev'"]
    lines += ["Requires-Dist: inferfleet[gateway]; extra == 'gateway-tracing'"]
    text = "Metadata-Version: 2.1\nName: inferfleet\nVersion: 0.1.0\n" + "\n".join(lines)
    (about / "METADATA").write_text(text + "\n")
    assert elsewhere(tmp_path, PRINT) == wheel.gateway()


def test_it_holds_the_gateway_and_nothing_else(made):
    folder = ROOT / "inferfleet/gateway"
    wanted = {
        f"inferfleet/gateway/{path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    about = {f"{ABOUT}/{name}" for name in ("METADATA", "WHEEL", "RECORD")}
    assert set(made.namelist()) == wanted | about
    assert {entry.external_attr >> 16 for entry in made.infolist()} == {0o100644}


def imported(made):
    """Every module that something in it imports, relative to nothing."""
    for path in made.namelist():
        tree = ast.parse(made.read(path)) if path.endswith(".py") else ast.Module([], [])
        for found in ast.walk(tree):
            if isinstance(found, ast.ImportFrom):
                yield found.module or ""
            elif isinstance(found, ast.Import):
                yield from (alias.name for alias in found.names)


def test_it_imports_itself_and_what_it_names_alone(made):
    every = set(imported(made))
    own = {module for module in every if module.startswith("inferfleet")}
    assert {".".join(module.split(".")[:2]) for module in own} == {"inferfleet.gateway"}
    others = {module.split(".")[0] for module in every - own} - set(sys.stdlib_module_names)
    named = {wheel.name(each).split("-")[0] for each in wheel.wanted("tracing")}
    assert {module.split("_")[0] for module in others} <= named | {"starlette"}  # of fastapi


def test_its_metadata_names_what_pyproject_asks_for(made):
    said = email.message_from_bytes(made.read(f"{ABOUT}/METADATA"))
    assert (said["Name"], said["Version"]) == ("inferfleet-gateway", "0.1.0")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = extras["optional-dependencies"]["gateway"]
    needs = said.get_all("Requires-Dist")
    assert sorted(need for need in needs if "extra" not in need) == sorted(wanted)
    assert [need for need in needs if need.startswith("opentelemetry-sdk")] == [
        'opentelemetry-sdk>=1.28; extra == "tracing"'
    ]
    assert not [need for need in needs if need.startswith("inferfleet")]


def test_every_direct_need_is_pinned():
    lines = wheel.PINS.read_text().splitlines()
    pinned = {wheel.name(line) for line in lines if not line.startswith("#")}
    assert {wheel.name(each) for each in wheel.wanted("tracing")} <= pinned
    assert all("==" in line for line in lines if not line.startswith("#"))


def test_pip_installs_it_and_checks_its_record(tmp_path):
    file = tmp_path / wheel.FILE
    file.write_bytes(wheel.gateway())
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = str(environment / "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(file)]
    subprocess.run(install, check=True, timeout=120)
    shown = subprocess.run(
        [*pip, "show", "--files", "inferfleet-gateway"], check=True, capture_output=True, text=True
    )
    assert "inferfleet/gateway/__init__.py" in shown.stdout
    told = "import inferfleet.gateway as g; print(g.__file__)"
    found = subprocess.run(
        [python, "-I", "-c", told], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert found.stdout.startswith(str(environment))


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("prometheus_client>=0.21", "prometheus-client"),
        ("opentelemetry-sdk==1.28", "opentelemetry-sdk"),
        ("aiohttp>=3.11", "aiohttp"),
        ("typing.extensions==4", "typing-extensions"),
        ("uvicorn[standard]>=0.3", "uvicorn"),
    ],
)
def test_names_are_compared_as_indexes_do(said, named):
    assert wheel.name(said) == named


def test_a_folder_says_what_it_lacks(tmp_path):
    for each in ("msgspec-1-py3-none-any.whl", "pip-26-py3-none-any.whl", "uvloop-1.tar.gz"):
        (tmp_path / each).touch()
    lacks = wheel.missing(tmp_path)
    assert {"fastapi", "uvloop"} <= set(lacks)
    assert not {"msgspec", "pip"} & set(lacks)
    assert set(wheel.missing(tmp_path, "tracing")) - set(lacks) >= {"opentelemetry-sdk"}


def test_a_version_no_wheel_exists_for_is_refused_in_words(tmp_path, capsys):
    assert wheelhouse.main([str(tmp_path / "wheels"), "--python", "2.6"]) == 1
    assert "pip download failed" in capsys.readouterr().err
