"""No value can break out of the file it lands in: whatever is written, a reader gets back exactly.

The readers are in `readers`; what they take a file to mean is compared with the real systemd,
nginx and compose here too.
"""

import hashlib
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import crossplane
import make
import pytest
import readers
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from inferfleet import quoting
from inferfleet.errors import InventoryError, RenderError
from inferfleet.inventory import load
from inferfleet.plan import build
from inferfleet.render import Renderer
from inferfleet.roles import Library
from inferfleet.secrets import Secrets

LIBRARY = Library()

NASTY = [
    "",
    " ",
    'a"b',
    "a'b",
    "a\\",
    "\\\\",
    "\\n \\x41 \\u0041 \\101",
    "$",
    "$$",
    "${HOME}",
    "$(id)",
    "`id`",
    "%",
    "%h%%i%",
    "{{ host }}",
    "{% raw %}",
    "a;b",
    ";",
    "; rm -rf /",
    "#",
    "a # b",
    "-",
    "--flag=x y",
    "\n",
    "a\nExecStart=/bin/sh",
    "\r\n\t\x0b\x1b[31m\x7f",
    "\x85\u2028\ufeff",
    "é 漢 🎉 \u202e",
    "a}\nb{",
    "[Service]",
    "key: value",
    "- x",
    "*a &b !c",
    "no",
    "1e3",
    "~^.*$",
    "'\"'\"'",
]
# what no program takes as an argument or a line of text
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs", "Cn"]), max_size=40)
VALUES = st.one_of(st.sampled_from(NASTY), TEXT, st.lists(st.sampled_from(NASTY)).map("".join))
FIXTURES = [HealthCheck.function_scoped_fixture]
FAST = settings(max_examples=300, deadline=None)


def has_controls(text):
    return any(ord(c) < 32 or ord(c) == 127 for c in text)


# filters


@FAST
@given(st.lists(VALUES, min_size=1, max_size=6))
@example(NASTY)
def test_a_command_line_is_read_back(values):
    argv = ["/bin/x", *values]
    text = f"[Service]\nExecStart={quoting.unit_command(argv)}\nUser=x\n"
    (start, user) = readers.unit(text)["Service"]
    assert readers.command(start[1]) == argv
    assert user == ("User", "x")


@FAST
@given(VALUES)
def test_an_environment_line_is_read_back(value):
    line = f"[Service]\nEnvironment={quoting.unit_environment(value, 'NAME')}\n"
    ((_, text),) = readers.unit(line)["Service"]
    assert readers.environment([text]) == {"NAME": value}


@FAST
@given(VALUES)
def test_free_text_stays_in_its_line(value):
    ((_, text),) = readers.unit(f"[Unit]\nDescription={quoting.unit_text(value)}\n")["Unit"]
    assert text
    assert "%" not in text.replace("%%", "")
    shown = " ".join("".join(" " if ord(c) < 32 or c in "\\\x7f" else c for c in value).split())
    assert text.replace("%%", "%") == (shown or "-")


@FAST
@given(VALUES)
def test_an_environment_file_is_read_back_or_refused(value):
    try:
        text = f"NAME={quoting.environment_file(value)}\n"
    except RenderError:
        assert has_controls(value)
    else:
        assert readers.environment_file(text) == {"NAME": value}


@FAST
@given(VALUES)
def test_yaml_and_compose_strings_are_read_back(value):
    text = f"a: {quoting.yaml_scalar(value)}\n{quoting.yaml_scalar(value)}: b\n"
    assert yaml.safe_load(text)["a"] == value
    assert yaml.safe_load(text)[value] == "b" or value == "a"
    loaded = yaml.safe_load(f"- {quoting.compose(value)}\n")
    assert readers.compose_text(loaded[0]) == value


@FAST
@given(VALUES)
def test_json_is_read_back(value):
    assert json.loads(quoting.json_value({value: [value, 1, None]})) == {value: [value, 1, None]}
    assert "\n" not in quoting.json_value(value)


@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURES)
@given(VALUES)
def test_an_nginx_string_is_read_back_or_refused(tmp_path, value):
    try:
        quoted = quoting.nginx(value)
    except RenderError:
        assert "$" in value or has_controls(value)
        return
    path = tmp_path / "nginx.conf"
    path.write_text(f"map $a $b {{\n    {quoted} 1;\n}}\nuser x;\n")
    (read,) = crossplane.parse(str(path), check_ctx=False, check_args=False)["config"]
    first, second = read["parsed"]
    (entry,) = first["block"]
    assert (readers.nginx_text(entry["directive"]), entry["args"]) == (value, ["1"])
    assert second["directive"] == "user"


@FAST
@given(VALUES)
def test_a_key_or_a_word_is_bare_or_refused(value):
    for quote, kept in ((quoting.bearer, "._~+/-="), (quoting.word, "_.:/@+,=~[]*-")):
        bare = value and all(c.isascii() and (c.isalnum() or c in kept) for c in value)
        try:
            assert quote(value) == value
            assert bare
        except RenderError:
            assert not bare or "=" in value  # which stands only at the end of a key


@pytest.mark.parametrize(
    "value", [" sesame", "ses ame", "sésame", "sesame;", '"sesame"', "=sesame"]
)
def test_a_refused_key_is_not_shown(value):
    for quote in (quoting.bearer, quoting.nginx_bearer, quoting.key_digest):
        with pytest.raises(RenderError) as caught:
            quote(value)
        assert "same" not in str(caught.value)


def test_of_a_key_its_digest_is_written_and_of_a_mask_the_mask():
    assert quoting.key_digest("sesame") == hashlib.sha256(b"sesame").hexdigest()
    assert quoting.key_digest(quoting.Mask("<secret env:KEY>")) == "<secret env:KEY>"


def test_json_over_many_lines_is_read_back_in_its_order():
    value = {"b": [1, {"a": "é\n"}], "a": None}
    text = quoting.json_lines(value)
    assert list(json.loads(text).items()) == list(value.items())
    assert text.count("\n") == 8


def test_a_nul_byte_cannot_be_passed_to_a_program():
    for quote in (quoting.unit_argument, lambda value: quoting.unit_environment(value, "A")):
        with pytest.raises(RenderError, match="NUL"):
            quote("a\0b")


# what the programs themselves read


def test_systemd_reads_command_lines_as_our_reader_does(tmp_path):
    """A user manager in test mode prints every command line it has read."""
    commands = [["/bin/x", value] for value in NASTY] + [["/bin/x", *NASTY]]
    read = _systemd(tmp_path, "".join(f"ExecStart={quoting.unit_command(c)}\n" for c in commands))
    lines = [line.partition("Command Line: ")[2] for line in read if "Command Line: /bin/x" in line]
    # systemd undoes $$ only when it runs a command
    doubled = [[word.replace("$", "$$") for word in command] for command in commands]
    assert [readers.words(line.replace("%", "%%")) for line in map(_undoubled, lines)] == doubled


def test_systemd_reads_environments_and_descriptions_as_our_reader_does(tmp_path):
    shown = [value for value in NASTY if value.isprintable()]
    lines = [f"Environment={quoting.unit_environment(v, f'N{i}')}\n" for i, v in enumerate(shown)]
    text = quoting.unit_text("100% {{ x }} $HOME; # '\"\n[Service]")
    lines.append("ExecStart=/bin/x\n")
    read = _systemd(tmp_path, "".join(lines), f"Description={text}\n")
    assert [line for line in read if line.startswith("Environment: N")] == [
        f"Environment: N{i}={value}" for i, value in enumerate(shown)
    ]
    assert "Description: 100% {{ x }} $HOME; # '\" [Service]" in read


def _undoubled(line):
    """A shell's escapes of ` and $ in what systemd prints, which a unit does not know."""
    return line.replace("\\$", "$").replace("\\`", "`")


def _systemd(folder, service, unit=""):
    """The lines a real systemd prints about a unit, none of them a complaint."""
    manager = "/usr/lib/systemd/systemd"
    if not Path(manager).exists():
        readers.missing("systemd is not here")
    units, runtime = folder / "units", folder / "run"
    for made in (units, runtime):
        made.mkdir()
    wanted = "[Unit]\nWants=x.service\nDefaultDependencies=no\n"
    (units / "default.target").write_text(wanted)
    (units / "x.service").write_text(
        f"[Unit]\nDefaultDependencies=no\n{unit}[Service]\nType=oneshot\n{service}"
    )
    as_user = []
    if os.geteuid() == 0:  # the manager's test mode refuses to run as root
        nobody = 65534
        as_user = [readers.program("setpriv"), f"--reuid={nobody}", f"--regid={nobody}"]
        as_user.append("--clear-groups")
        os.chown(runtime, nobody, nobody)
        for above in (folder, *folder.parents):
            if above.stat().st_uid == 0 and not above.stat().st_mode & 0o001:
                above.chmod(above.stat().st_mode | 0o011)
    own = {"HOME": runtime, "XDG_RUNTIME_DIR": runtime, "SYSTEMD_UNIT_PATH": units}
    printed = subprocess.run(
        [*as_user, manager, "--user", "--test", "--no-pager"],
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"} | {k: str(v) for k, v in own.items()},
        timeout=30,
    )
    lines = [line.lstrip() for line in printed.stdout.decode().split("\n")]
    assert "-> Unit x.service:" in lines, printed.stderr.decode()
    assert "x.service" not in printed.stderr.decode()
    return lines


def test_compose_reads_strings_and_environment_files_as_our_readers_do(tmp_path):
    lines = [f"      N{i}: {quoting.compose(value)}\n" for i, value in enumerate(NASTY)]
    arguments = [f"      - {quoting.compose(value)}\n" for value in NASTY]
    (tmp_path / "compose.yml").write_text(
        f"name: x\nservices:\n  engine:\n    image: x\n    env_file: [engine.env]\n"
        f"    environment:\n{''.join(lines)}    command:\n{''.join(arguments)}"
    )
    plain = [value for value in NASTY if not has_controls(value)]
    text = "".join(f"E{i}={quoting.environment_file(v)}\n" for i, v in enumerate(plain))
    (tmp_path / "engine.env").write_text(text)
    read = subprocess.run(
        [*readers.compose(), "-f", tmp_path / "compose.yml", "config", "--format", "json"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    service = json.loads(read.stdout)["services"]["engine"]
    assert [readers.compose_text(word) for word in service["command"]] == NASTY
    variables = {k: readers.compose_text(v) for k, v in service["environment"].items()}
    wanted = {f"N{i}": v for i, v in enumerate(NASTY)} | {f"E{i}": v for i, v in enumerate(plain)}
    assert variables == wanted


def test_nginx_reads_strings_as_they_were_meant(tmp_path):
    """Every string is answered by a real nginx, as the body of a location of its own."""
    sent = [v for v in NASTY if v and "$" not in v and not has_controls(v)]
    locations = [
        f"location = /{i} {{ return 200 {quoting.nginx(v)}; }}" for i, v in enumerate(sent)
    ]
    socket_path = tmp_path / "s"
    (tmp_path / "nginx.conf").write_text(
        "events {}\nhttp { access_log off; client_body_temp_path b; proxy_temp_path p;"
        " fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s1;"
        f" server {{ listen unix:{socket_path};\n" + "\n".join(locations) + "\n}}\n"
    )
    own = f"daemon off; master_process off; error_log stderr; pid {tmp_path}/pid;"
    arguments = ["-p", tmp_path, "-e", "stderr", "-c", "nginx.conf", "-g", own]
    with subprocess.Popen([readers.program("nginx"), *arguments]) as server:
        try:
            answers = [_ask(socket_path, f"/{number}") for number in range(len(sent))]
        finally:
            server.terminate()
    assert answers == sent


def _ask(path, url):
    """The body of an answer over a Unix socket, as soon as there is a listener."""
    deadline = time.monotonic() + 10
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(path))
            except OSError:
                assert time.monotonic() < deadline, "nginx did not start"
                time.sleep(0.005)
                continue
            connection.sendall(f"GET {url} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
            return answer.partition(b"\r\n\r\n")[2].decode()


# whole inventories

HOSTILE = """\
hosts:
  gpu-01: {{address: 192.0.2.1, gpus: [{{model: A}}, {{model: A}}, {{model: A}}]}}
models:
  m: {{repository: {repository}, served_name: {served}}}
deployments:
  native:
    {{engine: vllm, model: m, hosts: [gpu-01], port: 8000, api_key: !env KEY, extra_args: {extra},
     options: {{runtime: native, environment: {environment}}}}}
  docker:
    {{engine: vllm, model: m, hosts: [gpu-01], port: 8100, api_key: !env KEY, extra_args: {extra},
     options: {{runtime: docker, environment: {environment}}}}}
  stand-in: {{engine: simulator, model: m, hosts: [gpu-01], port: 8200, api_key: !env KEY}}
phases:
  p:
    users: 1
    why: {why}
    hosts: [gpu-01]
    deployments: [native, docker, stand-in]
    roles:
      balancer: {{hosts: [gpu-01], server_name: {server}, api_keys: {{{client}: !env KEY}}}}
"""
EXTREME = {
    "repository": "a b/{{ x }} $HOME",
    "served": "c;d\n%h",
    "extra": ["--chat-template", "%h $y\n[Service]", '--chat-template=" ; '],
    "environment": {"A": "}\nB=1", "B": "$(id)"},
    "why": "because: \n",
    "server": "llm.example.com",
    "client": "team-a",
}
SOME = VALUES.filter(bool)
EXTRA = st.one_of(  # an option of vLLM's that takes any text: unknown ones are refused
    st.just([]),
    VALUES.map(lambda value: ["--chat-template", value]),
    VALUES.map(lambda value: [f"--chat-template={value}"]),
)


def _hostile(folder, **values):
    written = {name: _flow(value) for name, value in values.items()}
    inventory = make.write(folder, fleet=HOSTILE.format(**written))
    loaded = load(inventory, LIBRARY)
    plan = build(loaded, loaded.phases["p"], LIBRARY)
    bundle = Renderer(LIBRARY, Secrets(inventory, environ={"KEY": "k3y"})).bundle(plan, *plan.hosts)
    return {artefact.path: artefact.content.decode() for artefact in bundle.artefacts}


def _flow(value):
    text = yaml.safe_dump(value, default_style='"', default_flow_style=True, width=2**31)
    return text.strip()


def _files(folder, values):
    """What is rendered, or None when the values are refused, with the place or the host named."""
    try:
        return _hostile(folder, **values)
    except (InventoryError, RenderError) as caught:
        error = caught
    if isinstance(error, RenderError):
        assert str(error).startswith("gpu-01: ")
    else:
        assert all(p.file.endswith("fleet.yml") and p.line for p in error.problems)
    return None


def test_a_hostile_inventory_can_be_rendered(tmp_path):
    """Else the next test would prove nothing."""
    assert _files(tmp_path, EXTREME)


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURES)
@given(
    repository=SOME,
    served=SOME,
    extra=EXTRA,
    environment=st.dictionaries(st.sampled_from(["A", "B"]), VALUES),
)
def test_every_file_of_a_hostile_inventory_says_what_was_meant(tmp_path, **values):
    values = EXTREME | values
    found = _files(tmp_path, values)
    if found is None:
        return
    served, repository, extra = values["served"], values["repository"], values["extra"]
    service = readers.unit(found["/etc/systemd/system/inferfleet-native-0.service"])["Service"]
    argv = readers.command(dict(service)["ExecStart"])
    assert argv[1:3] == ["serve", repository]
    assert argv[argv.index("--served-model-name") + 1] == served
    assert argv[len(argv) - len(extra) :] == extra
    lines = [value for key, value in service if key == "Environment"]
    assert readers.environment(lines).items() >= values["environment"].items()

    compose = yaml.safe_load(found["/etc/inferfleet/docker-0/compose.yml"])["services"]["engine"]
    command = [readers.compose_text(word) for word in compose["command"]]
    assert (command[0], command[len(command) - len(extra) :]) == (repository, extra)
    variables = {k: readers.compose_text(v) for k, v in compose["environment"].items()}
    assert variables.items() >= values["environment"].items()
    assert list(compose) == [key for key in compose if key in COMPOSE_KEYS]

    stand_in = readers.unit(found["/etc/systemd/system/inferfleet-stand-in-0.service"])["Service"]
    argv = readers.command(dict(stand_in)["ExecStart"])
    assert argv[argv.index("--served-model-name") + 1] == served
    for path, text in found.items():
        if path.endswith("/engine.env"):
            assert readers.environment_file(text) == {"VLLM_API_KEY": "k3y"}
    _assert_nginx(tmp_path, found, values)


@settings(max_examples=20, deadline=None, suppress_health_check=FIXTURES)
@given(server=VALUES, client=VALUES, why=VALUES)
def test_a_balancers_hostile_names_are_refused_or_read_back(tmp_path, **values):
    values = EXTREME | values
    if found := _files(tmp_path, values):
        _assert_nginx(tmp_path, found, values)


COMPOSE_KEYS = (
    *("image", "entrypoint", "volumes", "healthcheck", "command", "env_file", "environment"),
    *("ports", "shm_size", "security_opt", "restart", "stop_grace_period", "deploy"),
)


def _assert_nginx(folder, found, values):
    for path, text in found.items():
        if path.startswith("/etc/inferfleet/balancer/"):
            (folder / path.rpartition("/")[2]).write_text(text)
    parsed = crossplane.parse(str(folder / "nginx.conf"), single=True, check_args=True)
    (http,) = [d for d in parsed["config"][0]["parsed"] if d["directive"] == "http"]
    (server,) = [d for d in http["block"] if d["directive"] == "server"]
    names = [d["args"] for d in server["block"] if d["directive"] == "server_name"]
    assert names == [[values["server"]]]
    clients = crossplane.parse(str(folder / "clients.conf"), check_ctx=False)["config"][0]
    (key_map,) = clients["parsed"]
    assert [(d["directive"], d["args"]) for d in key_map["block"]] == [
        ("default", [""]),
        ("~^(?i:Bearer) k3y$", [values["client"]]),
    ]
