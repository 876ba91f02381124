"""The command: help for everything, exit codes, JSON, projects without a clone, a fast start."""

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import make
import pytest

from inferfleet.cli import namespace
from inferfleet.cli.command import agreed

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-W", "error", "-m", "inferfleet"]
WRONG = "hosts: {web: {adress: 192.0.2.1, user: no}}\n"


def run(folder, *words, command=COMMAND, **environment):
    own = {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [*command, *words],
        cwd=folder,
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


@pytest.fixture
def project(tmp_path):
    shutil.copytree(ROOT / "inventory", tmp_path / "inventory")
    return tmp_path


# help


@pytest.mark.parametrize("task", namespace.tasks.values(), ids=lambda task: task.name)
def test_every_task_and_option_has_help(task):
    assert task.__doc__
    assert task.__doc__.strip().endswith(".")
    for argument in task.get_arguments():
        assert argument.help, f"{task.name} --{argument.name}"


def test_tasks_and_their_options_are_listed(tmp_path):
    listed = run(tmp_path, "--list")
    assert (listed.returncode, listed.stderr) == (0, "")
    for name in namespace.task_names:
        assert f"  {name} " in listed.stdout
    shown = run(tmp_path, "--help", "provision")
    assert "--yes" in shown.stdout
    assert shown.returncode == 0


@pytest.mark.parametrize("words", [["--help"], ["check", "--help"], ["--help", "check"]])
def test_help_shows_our_options_and_not_those_of_invoke(tmp_path, words):
    shown = run(tmp_path, *words)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--help" in shown.stdout if words == ["--help"] else "--limit" in shown.stdout
    for foreign in ("Core", "--pty", "--dry", "--hide", "--echo", "sudo-password", "write-pyc"):
        assert foreign not in shown.stdout


# exit codes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quux"], "No idea what 'quux' is"),
        (["check", "--quux"], "No idea what '--quux' is"),
        (["render", "--phase", "pilt"], "there is no phase 'pilt' (did you mean pilot?)"),
        (["render", "--phase", "pilot", "--limit", "lb-01"], "lb-01"),
        (
            ["check", "--limit", "gpu-01,lb-1"],
            "--limit gpu-01,lb-1: there is no host or group 'lb-1' (did you mean lb-01?)",
        ),
        (["render", "--phase", "pilot", "--limit", ","], "--limit ,: none of the hosts here"),
        (["render", "--output", "out"], "--output is for one phase"),
        (["plan"], "which phase?"),
        (["trust", "gpu-1"], "there is no host 'gpu-1' (did you mean gpu-01?)"),
        (["lab", "--hosts", "few"], "--hosts is a whole number, not 'few'"),
        (["--dry", "provision", "--phase", "pilot", "--yes"], "`plan` shows what would change"),
    ],
)
def test_wrong_usage_is_two(project, words, said):
    done = run(project, *words)
    assert done.returncode == 2, done
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["check"], ["render"], ["plan", "--phase", "p"]])
def test_problems_are_one_and_nothing_is_written(tmp_path, words):
    make.write(tmp_path, own=WRONG)
    done = run(tmp_path, *words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "inventory/own.yml:1:15: hosts.web.adress: unknown key (did you mean address?)",
        "inventory/own.yml:1:40: hosts.web.user: must be of type string, not false;"
        ' YAML reads unquoted no as false; write "no" if text is meant',
        "2 problems.",
    ]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["own.yml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lab", "--hosts", "0"], "--hosts must be at least 1"),
        (["schema", "--output", "nowhere/schema.json"], "nowhere/schema.json: no such file"),
        (["render", "--phase", "pilot", "--output", "inventory/hosts.yml/x"], "not a directory"),
    ],
)
def test_what_cannot_be_written_is_one_line(project, words, said):
    done = run(project, *words)
    assert done.returncode == 1, done
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["--help"], ["render", "--json"]])
def test_a_reader_may_go_away(project, words):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, *words],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writing,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminal_may_lack_signs(tmp_path):
    make.write(tmp_path, own="hosts: {wéb: {address: 192.0.2.1}}")
    done = run(tmp_path, "check", PYTHONIOENCODING="ascii")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "hosts.w?b: not a name" in done.stderr


def test_no_answer_is_no(monkeypatch, capsys):
    ours, terminal = pty.openpty()
    os.write(ours, b"\x04")  # Ctrl-D
    with os.fdopen(terminal) as ended:
        monkeypatch.setattr("sys.stdin", ended)
        assert agreed("Sure?") is False
    os.close(ours)
    assert capsys.readouterr().out == "Sure? [y/N] \n"


def test_fine_is_zero(project):
    done = run(project, "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "inventory: fine (8 hosts, 3 models, 3 deployments, 3 phases).\n"


def test_no_inventory_is_a_problem_that_says_what_to_do(tmp_path):
    done = run(tmp_path, "check")
    assert done.returncode == 1
    assert "inferfleet init" in done.stderr


# traps of YAML, as they come through the command

TRAPS = {
    b"hosts: {web: {}}\nhosts: {}\n": "2:1: hosts: duplicate key",
    b"hosts:\n\tweb: {}\n": "2:1: a tab",
    b"hosts: {no: {}}\n": "1:9: hosts.no: YAML reads the key no as",
    b"\xff\xfeh\x00o\x00": "",
    b"\x80\n": "1:",
    b"- hosts\n": "1:1: a file must be a mapping",
    b"hosts: !!python/object:os.system {}\n": "1:8: hosts: unknown tag",
    b"hosts: {x: {key: !envv X}}\n": "1:18: hosts.x.key: unknown tag !envv",
}


def test_every_trap_of_yaml_is_one_line_with_a_place(tmp_path):
    for number, content in enumerate(TRAPS):
        (make.write(tmp_path, **{f"{number}": ""}) / f"{number}.yml").write_bytes(content)
    done = run(tmp_path, "check")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for number, said in enumerate(TRAPS.values()):
        assert f"inventory/{number}.yml:{said}" in done.stderr


def test_an_anchors_bomb_ends_soon(tmp_path):
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    make.write(tmp_path, own="\n".join(lines) + "\n")
    began = time.monotonic()
    done = run(tmp_path, "check")
    assert done.returncode == 1
    assert time.monotonic() - began < 10
    assert "Traceback" not in done.stderr


# JSON


def test_check_and_its_problems_as_json(tmp_path, project):
    fine = json.loads(run(project, "check", "--json").stdout)
    assert (fine["ok"], fine["problems"], fine["hosts"]) == (True, [], 8)
    make.write(tmp_path, own=WRONG)
    done = run(tmp_path, "check", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"], done.stderr) == (1, False, "")
    assert told["problems"][0] == {
        "file": "inventory/own.yml",
        "line": 1,
        "column": 15,
        "path": "hosts.web.adress",
        "message": "unknown key (did you mean address?)",
        "warning": False,
    }


def test_render_prints_its_index_as_json(project):
    done = run(project, "render", "--phase", "local", "--json")
    index = json.loads(done.stdout)["local"]
    written = json.loads((project / "build" / "local" / "index.json").read_text())
    assert index == written["hosts"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--phase", "x"], "there is no phase 'x'"),
        (["render", "--phase", "x"], "there is no phase 'x'"),
        (["provision", "--phase", "pilot"], "--json cannot ask: add --yes"),
    ],
)
def test_wrong_usage_as_json(project, words, said):
    done = run(project, *words, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["problems"][0]["message"].startswith(said)


# projects


def test_init_makes_a_project_that_checks_and_renders_anywhere(tmp_path):
    made = run(tmp_path, "init")
    assert made.returncode == 0, made.stderr
    assert "inventory/hosts.yml" in made.stdout
    assert run(tmp_path, "check").returncode == 0
    assert run(tmp_path, "render").returncode == 0
    assert (tmp_path / "build" / "production" / "index.json").is_file()
    assert not (tmp_path / "roles").exists()
    again = run(tmp_path, "init")
    assert again.returncode == 1
    assert "exists already; nothing was changed" in again.stderr


def test_init_takes_a_folder(tmp_path):
    assert run(tmp_path, "init", "--folder", "fleet").returncode == 0
    done = run(tmp_path, "check", "--inventory", "fleet/inventory")
    assert done.stdout.startswith("fleet/inventory: fine")


def test_an_installed_package_holds_what_it_needs(tmp_path):
    """Laid out as the wheel is: roles, templates and the example inside the package."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "inferfleet", site / "inferfleet")
    for name in ("roles", "templates", "inventory"):
        shutil.copytree(ROOT / name, site / "inferfleet" / "data" / name)
    home = tmp_path / "home"
    home.mkdir()
    for words in (["init"], ["check"], ["render", "--rehearse"]):
        done = run(home, *words, PYTHONPATH=str(site))
        assert done.returncode == 0, done.stderr
    assert (home / "build" / "pilot" / "gpu-01" / "opt/inferfleet/simulator/simulator.py").is_file()


def test_an_engine_of_ones_own(project):
    shutil.copytree(ROOT / "roles" / "simulator", project / "roles" / "mine")
    make.write(
        project,
        mine="""\
            deployments:
              own: {engine: mine, model: qwen2.5-coder-7b, hosts: [pilot], port: 9000}
            phases: {trial: {users: 1, why: w, hosts: [pilot], deployments: [own]}}
        """,
    )
    assert run(project, "check").returncode == 0
    assert run(project, "schema").returncode == 0
    schema = json.loads((project / "inventory" / "schema.json").read_text())
    assert "mine" in schema["$defs"]["deployment"]["properties"]["engine"]["enum"]
    assert run(project, "render", "--phase", "trial").returncode == 0
    unit = project / "build/trial/gpu-01/etc/systemd/system/inferfleet-own-0.service"
    assert "simulator own-0" in unit.read_text()


def test_limit_takes_hosts_groups_and_globs(project):
    for limit, hosts in (("lb-01,gpu-0[23]", 3), ("balancers", 2), ("*", 7)):
        words = ["--phase", "production", "--limit", limit]
        done = run(project, "render", *words)
        assert done.returncode == 0, done.stderr
        assert f"for {hosts} hosts" in done.stdout


# start


def test_the_command_line_imports_nothing_heavy():
    heavy = ("paramiko", "jinja2", "jsonschema", "pytest", "rich", "cryptography", "yaml")
    script = f"import sys, inferfleet.cli; print([m for m in {heavy} if m in sys.modules])"
    done = run(ROOT, "-c", script, command=[sys.executable])
    assert json.loads(done.stdout.replace("'", '"')) in ([], ["yaml"])  # invoke may bring its own


def test_listing_tasks_is_fast(tmp_path):
    """The best of three, in CPU seconds of the command: what else runs here does not count."""
    assert min(_cpu_seconds(tmp_path) for _ in range(3)) < 1.0


def _cpu_seconds(folder):
    before = os.times()
    run(folder, "--list")
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
