"""The gateway's wheel: the same bytes anywhere, what pip takes, and nothing of the rest."""

import email
import io
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from inferfleet import wheel

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


def test_nothing_in_it_needs_the_rest_of_the_package(made):
    for path in made.namelist():
        for line in made.read(path).decode().splitlines() if path.endswith(".py") else ():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and words[1].startswith("inferfleet"):
                assert words[1].startswith("inferfleet.gateway"), f"{path}: {line}"


def test_its_metadata_names_what_pyproject_asks_for(made):
    said = email.message_from_bytes(made.read(f"{ABOUT}/METADATA"))
    assert (said["Name"], said["Version"]) == ("inferfleet-gateway", "0.1.0")
    needs = said.get_all("Requires-Dist")
    assert {wheel.name(need) for need in needs if "extra" not in need} == {
        *("aiohttp", "fastapi", "httptools", "msgspec", "prometheus-client", "uvicorn", "uvloop")
    }
    assert [need for need in needs if need.startswith("opentelemetry-sdk")] == [
        'opentelemetry-sdk>=1.28; extra == "tracing"'
    ]
    assert not [need for need in needs if need.startswith("inferfleet")]


def test_every_direct_need_is_pinned():
    lines = wheel.PINS.read_text().splitlines()
    pinned = {wheel.name(line) for line in lines if not line.startswith("#")}
    wanted = {*wheel.requirements(), *wheel.requirements("tracing"), "pip"}
    assert {wheel.name(each) for each in wanted} <= pinned
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
    for each in ("aiohttp-1-py3-none-any.whl", "pip-26-py3-none-any.whl", "uvloop-1.tar.gz"):
        (tmp_path / each).touch()
    lacks = wheel.missing(tmp_path)
    assert lacks == ["fastapi", "httptools", "msgspec", "prometheus-client", "uvicorn", "uvloop"]
    assert "opentelemetry-api" in wheel.missing(tmp_path, "tracing")


def test_a_version_no_wheel_exists_for_is_refused_in_words(tmp_path, capsys):
    assert wheel.main([str(tmp_path / "wheels"), "--python", "2.6"]) == 1
    assert "pip download failed" in capsys.readouterr().err
