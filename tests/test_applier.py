"""The applier as it is sent: real files in a folder, real commands, a systemctl that lists."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folderhost import FolderHost, Session, bundle

from inferfleet import wire
from inferfleet.applier.commands import latest
from inferfleet.errors import ApplyError
from inferfleet.model import Artefact, Bundle, Ensure, Host

UNIT = Artefact("/etc/systemd/system/a.service", b"[Unit]\n", restarts=("a.service",))
CONFIG = Artefact("/etc/a/a.conf", b"port = 1\n", mode=0o640, restarts=("a.service",))
SITE = Artefact("/etc/nginx/site.conf", b"server\n", reloads=("nginx.service",))


@pytest.fixture
def host(tmp_path):
    host = FolderHost(tmp_path / "root", tmp_path / "fake")
    (host.fake / "known/nginx.service").touch()
    return host


def names(events):
    return [event["event"] for event in events]


def test_first_run_second_run_one_change(host):
    events = host.apply(bundle(UNIT, CONFIG))
    assert events[-1] == {"event": "done", "changes": 2, "restarts": 1}
    assert host.calls() == ["daemon-reload", "restart a.service"]
    assert host.tree()["etc/a/a.conf"] == (stat.S_IFREG | 0o640, b"port = 1\n")
    assert host.tree()["etc/a"][0] == stat.S_IFDIR | 0o755

    assert host.apply(bundle(UNIT, CONFIG)) == [{"event": "done", "changes": 0, "restarts": 0}]
    assert host.calls() == []

    changed = Artefact(CONFIG.path, b"port = 2\n", mode=0o640, restarts=("a.service",))
    events = host.apply(bundle(UNIT, changed))
    assert events[-1] == {"event": "done", "changes": 1, "restarts": 1}
    assert host.calls() == ["restart a.service"], "no unit file changed: no daemon-reload"


def test_a_mode_alone_is_repaired(host):
    host.apply(bundle(CONFIG))
    (host.root / "etc/a/a.conf").chmod(0o666)
    assert host.apply(bundle(CONFIG))[-1]["changes"] == 1
    assert host.tree()["etc/a/a.conf"][0] & 0o777 == 0o640


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_owners_are_set_on_a_real_root(tmp_path):
    """Below /srv, in a mount namespace of its own."""
    owned = Artefact("/srv/a/b", b"x", mode=0o640, owner="daemon", group="sys")
    wanted = bundle(owned, Ensure("look", "false", "stat -c %U:%G:%a /srv/a/b; exit 1"))
    host = FolderHost(Path("/"), tmp_path / "fake")
    environment = {**host.environment(), "INFERFLEET_ROOT": "", "INFERFLEET_RUN": ""}
    alone = f"mount -t tmpfs none /srv && mount -t tmpfs none /var/lib && {wire.BOOTSTRAP}"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", alone], stdin=pipe, stdout=pipe, env=environment
    ) as process:
        session = Session(process)
        seen = session.ask(wanted)
        assert (seen.files[owned.path].kind, seen.failing) == ("absent", {0})
        session.send(*wire.request(wanted, seen, owner="ana", reason="test"))
        with pytest.raises(ApplyError, match=r"\ndaemon:sys:640$"):
            list(wire.events("gpu-1", session.lines))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_an_unknown_owner_stops_all(tmp_path):
    host = FolderHost(tmp_path / "root", tmp_path / "fake")
    host.settings = {"INFERFLEET_ROOT": ""}
    wanted = bundle(Artefact(f"{tmp_path}/root/a", b"", owner="nobody-at-all"))
    alone = f"mount -t tmpfs none /var/lib && {wire.BOOTSTRAP}"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", alone], stdin=pipe, stdout=pipe, env=host.environment()
    ) as process:
        session = Session(process)
        session.send(*wire.request(wanted, session.ask(wanted), owner="ana", reason="test"))
        with pytest.raises(ApplyError, match="name not found: 'nobody-at-all'"):
            list(wire.events("gpu-1", session.lines))
    assert host.tree() == {}


def test_what_is_no_longer_wanted_goes_with_its_unit_and_folders(host):
    host.apply(bundle(UNIT, CONFIG, SITE))
    host.calls()
    (host.root / "etc/nginx/foreign").touch()
    events = host.apply(bundle())
    assert names(events) == ["unit", "unit", "remove", "remove", "remove"] + ["unit"] * 4 + ["done"]
    assert host.calls() == [
        "disable --now a.service",
        "daemon-reload",
        "reload-or-restart nginx.service",
    ]
    assert set(host.tree()) == {"etc", "etc/nginx", "etc/nginx/foreign"}
    assert events[-1] == {"event": "done", "changes": 3, "restarts": 1}


def test_instances_of_a_template_are_stopped(host):
    template = Artefact("/etc/systemd/system/m@.service", b"", restarts=("m@0.service",))
    for unit in ("m@0.service", "m@1.service"):
        (host.fake / "known" / unit).touch()
    host.apply(bundle(template, Artefact("/etc/m1", b"", restarts=("m@1.service", "b.service"))))
    host.calls()
    host.apply(bundle())
    assert [call for call in host.calls() if "disable" in call] == [
        "disable --now m@0.service",
        "disable --now m@1.service",
    ]


def test_a_removed_dropin_stops_nothing_but_is_reloaded_and_restarted(host):
    dropin = Artefact("/etc/systemd/system/a.service.d/x.conf", b"", restarts=("a.service",))
    host.apply(bundle(UNIT, dropin))
    host.calls()
    host.apply(bundle(UNIT))
    assert host.calls() == ["daemon-reload", "restart a.service"]


def test_roles_are_activated_in_order_and_units_once(host):
    def files(role):
        unit = f"{role}.service"
        (host.fake / "known" / unit).touch()
        return (
            Artefact(f"/etc/{role}/1", b"", restarts=(unit,), reloads=("nginx.service",)),
            Artefact(f"/etc/{role}/2", b"", restarts=(unit,), reloads=(unit,)),
            Ensure(f"{role} answers", f"test -e $FAKE/{role}", f"touch $FAKE/{role}"),
            Ensure(f"{role} user", f"test -e $FAKE/{role}u", f"touch $FAKE/{role}u", before=True),
        )

    two = Bundle(Host("gpu-1", "192.0.2.1"), "pilot", (("y", files("y")), ("x", files("x"))))
    events = [e for e in host.apply(two) if e.get("state") == "ok"]
    assert [e.get("title") or f"{e['verb']} {e['unit']}" for e in events] == [
        "y user",
        "x user",
        "restart y.service",
        "reload nginx.service",
        "y answers",
        "restart x.service",
        "x answers",
    ]


def test_a_unit_that_cannot_be_stopped_is_stopped_by_a_later_run(host):
    host.apply(bundle(UNIT, CONFIG))
    for state in ("broken", "active"):
        (host.fake / state / "a.service").touch()
    message = host.failure(bundle())
    assert message.startswith("a.service cannot be stopped (exit status 1)")
    assert message.endswith("Job for a.service failed.")
    assert host.snapshot(bundle()).interrupted
    assert "etc/systemd/system/a.service" in host.tree()

    (host.fake / "active/a.service").unlink()
    assert host.apply(bundle())[-1]["event"] == "done"
    assert host.tree() == {}


def test_a_failing_unit_stays_owed_and_shows_its_journal(host):
    host.apply(bundle(UNIT, CONFIG))
    (host.fake / "broken/a.service").touch()
    changed = bundle(UNIT, Artefact(CONFIG.path, b"port = 2\n", restarts=("a.service",)))
    message = host.failure(changed)
    assert message.startswith("restart of a.service failed (exit status 1); it is still owed:")
    assert message.endswith(
        "Job for a.service failed.\njournal of -u a.service -n 15 --no-pager -o cat"
    )
    assert host.snapshot(changed).owed == ("a.service",)

    (host.fake / "broken/a.service").unlink()
    host.calls()
    events = host.apply(changed)
    assert host.calls() == ["restart a.service"]
    assert events[-1] == {"event": "done", "changes": 0, "restarts": 1}
    assert host.snapshot(changed).owed == ()


def test_an_owed_unit_that_vanished_is_dropped(host):
    events = host.apply(bundle(Artefact("/etc/a", b"", restarts=("never.service",))))
    assert {"event": "unit", "unit": "never.service", "verb": "restart", "state": "gone"} in events
    assert events[-1]["restarts"] == 0
    assert host.snapshot(bundle()).owed == ()


def test_a_symlink_is_replaced_and_never_followed(host):
    (host.root / "etc").mkdir()
    (host.root / "precious").write_bytes(b"keep")
    (host.root / "etc/site.conf").symlink_to(host.root / "precious")
    host.apply(bundle(Artefact("/etc/site.conf", b"ours")))
    assert (host.root / "precious").read_bytes() == b"keep"
    assert not (host.root / "etc/site.conf").is_symlink()


def test_a_directory_in_the_place_of_a_file_stops_all_before_anything_is_touched(host):
    (host.root / "etc/a/a.conf/x").mkdir(parents=True)
    before = host.tree()
    assert host.failure(bundle(UNIT, CONFIG)) == (
        "/etc/a/a.conf is a directory; a file is wanted there"
    )
    assert host.tree() == before


@pytest.mark.parametrize("sign", ["exit status 3", "ran out of time"])
def test_a_failing_before_ensure_stops_all(host, sign):
    run = "seq 40; exit 3" if "status" in sign else "seq 40; sleep 60"
    ensure = Ensure("nginx is installed", "false", run, timeout=1, before=True)
    message = host.failure(bundle(UNIT, ensure))
    lines = message.splitlines()
    assert lines[0].startswith(f"nginx is installed: {sign}")
    assert lines[1:] == [str(number) for number in range(26, 41)]
    assert host.tree() == {}
    assert host.remembered() == {"lock", "blobs", "generations"}


def test_a_fix_that_does_not_help_is_told(host):
    message = host.failure(bundle(Ensure("swap is off", "echo still on; false", "echo tried")))
    assert message.splitlines() == [
        "swap is off: exit status 1",
        "tried",
        "still on",
        "its test still fails",
    ]


def test_an_ensure_without_a_fix_is_waited_for(host):
    counts = "echo x >>$FAKE/n; test $(wc -l <$FAKE/n) -ge 3"
    events = host.apply(bundle(Ensure("answers", counts, timeout=30)))
    assert [e.get("state") for e in events] == ["running", "ok", None]


def test_waiting_ends_and_shows_the_units_journal(host):
    message = host.failure(bundle(UNIT, Ensure("answers", "echo 503; false", timeout=1)))
    assert message.splitlines() == [
        "answers: ran out of time after 1 s",
        "503",
        "journal of -u a.service -n 15 --no-pager -o cat",
    ]
    assert host.snapshot(bundle()).owed == (), "it was restarted"


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def test_a_command_out_of_time_is_killed_with_all_its_children(host):
    script = "sh -c 'trap \"\" TERM; echo $$ >$FAKE/child; exec sleep 300' & wait"
    host.failure(bundle(Ensure("hangs", "false", script, timeout=1)))
    child = int((host.fake / "child").read_text())
    end = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < end


def test_a_daemon_left_behind_does_not_block(host):
    began = time.monotonic()
    ensure = Ensure("d", "test -e $FAKE/p", "sleep 30 & echo $! >$FAKE/p", timeout=20)
    host.apply(bundle(ensure))
    os.kill(int((host.fake / "p").read_text()), signal.SIGKILL)
    assert time.monotonic() - began < 10


def applying(session: Session, wanted: Bundle):
    """The events of an apply, as they come."""
    session.send(*wire.request(wanted, session.ask(wanted), owner="ana", reason="test"))
    return wire.events("gpu-1", session.lines)


def test_what_a_command_prints_is_told_before_it_ends(host):
    """It goes on only once its last line has come; a bar that overwrites itself is one line."""
    bar = "printf 'pulling\\n'; for n in 1 2 3; do printf '\\033[32m%s0 %%\\033[0m\\r' $n; done"
    run = f"{bar}; until [ -e $FAKE/go ]; do sleep 0.02; done; touch $FAKE/there"
    with host.session() as session:
        events = applying(session, bundle(Ensure("model", "test -e $FAKE/there", run)))
        assert next(events)["state"] == "running"
        assert next(events) == {"event": "output", "title": "model", "line": "30 %"}
        (host.fake / "go").touch()
        assert [event.get("state") for event in events] == ["ok", None]


def test_a_chatty_command_is_told_of_at_most_twice_a_second(host):
    run = "timeout 2 yes $(seq 1 50) | cat -n; touch $FAKE/there"
    began = time.monotonic()
    events = host.apply(bundle(Ensure("chats", "test -e $FAKE/there", run)))
    assert 2 <= names(events).count("output") <= 2 * (time.monotonic() - began) + 1


def test_a_client_that_stops_reading_holds_nothing_up(host):
    """What it reads later, once the command has ended, is whole; what did not fit was left out."""
    long = "for n in 1 2 3 4 5 6; do printf '%0900d\\n' $n; sleep 0.5; done; touch $FAKE/there"
    with host.session() as session:
        fcntl.fcntl(session.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        events = applying(session, bundle(Ensure("prints", "test -e $FAKE/there", long)))
        end = time.monotonic() + 20
        while not (host.fake / "there").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert names(events)[-2:] == ["ensure", "done"]
        assert session.process.wait(20) == 0


def test_a_client_that_never_reads_on_is_given_up():
    """With no patience: the first event fills the pipe, the rest goes nowhere."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    script = (
        "from inferfleet.applier import commands\n"
        "commands.PATIENCE = 0\n"
        "for number in range(100): commands.emit('failed', message='x' * 5000)\n"
    )
    subprocess.run([sys.executable, "-c", script], stdout=writing, timeout=20, check=True)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert len(pipe.read()) == 4096


@pytest.mark.parametrize(
    ("printed", "whole", "line"),
    [
        (b"", True, ""),
        (b"half a lin", True, ""),
        (b"one\ntwo\nthr", True, "two"),
        (b"one\r\n\r\n", True, "one"),
        (b"cut off\nhalf", False, ""),
        (b"off\n one \n", False, "one"),
        (b"\r10 %\r20 %\r30", True, "20 %"),
        (b"\x1b]0;title\x07\x1b[1;31mred\x1b[0m\tx\x08\n", True, "red     x"),
        (b"\xff\xe2\x82\xac\n", True, "\ufffd\u20ac"),
    ],
)
def test_only_what_was_printed_to_its_end_is_told(printed, whole, line):
    assert latest(printed, whole) == line


def test_a_failing_commands_bar_is_one_line(host):
    run = "for n in $(seq 30); do printf '\\r%s %%' $n; done; echo; echo no space; exit 1"
    message = host.failure(bundle(Ensure("pull", "false", run)))
    assert message.splitlines() == ["pull: exit status 1", "30 %", "no space"]


def test_commands_get_an_ordinary_umask_and_no_input(host):
    host.apply(bundle(Ensure("m", "test -e $FAKE/m", "cat >$FAKE/m", before=True)))
    assert (host.fake / "m").stat().st_mode & 0o777 == 0o644


def test_validators_see_all_files_under_one_root(host):
    see = ("sh", "-c", 'cat "$1" other ../a/a.conf && pwd', "sh", "{path}")
    host.apply(bundle(CONFIG, Artefact("/etc/b/other", b"")))
    wanted = bundle(
        CONFIG, Artefact("/etc/b/main", b"", validate=see), Artefact("/etc/b/other", b"")
    )
    assert {"event": "check"}.items() <= host.apply(wanted)[0].items()


def test_a_validator_that_refuses_leaves_all_as_it_was(host):
    host.apply(bundle(UNIT, CONFIG))
    before, remembered = host.tree(), host.remembered()
    refuse = ("sh", "-c", "echo $1:3: what is this; exit 1", "sh", "{path}")
    message = host.failure(bundle(UNIT, Artefact(CONFIG.path, b"new", validate=refuse)))
    assert message == "a.conf is not valid, says sh:\na.conf:3: what is this"
    assert (host.tree(), host.remembered()) == (before, remembered)
    assert "sh: No such file" not in message
    missing = ("no-such-checker", "{path}")
    assert host.failure(bundle(Artefact("/etc/x", b"", validate=missing))).endswith(
        "no-such-checker: No such file or directory"
    )


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_analyze_refuses_an_unknown_key_of_ours_alone(host):
    verify = ("systemd-analyze", "verify", "--man=no", "{path}")
    good = b"[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"

    def unit(text):
        return bundle(Artefact("/etc/systemd/system/ours.service", text, validate=verify))

    host.apply(unit(good))
    said = host.failure(unit(good.replace(b"ExecStart", b"ExecStrat=1\nExecStart")))
    assert re.match(r"ours.service is not valid, says systemd-analyze:\n", said)
    assert re.search(r"ours.service:2: Unknown key .*'ExecStrat'", said)
    assert (host.root / "etc/systemd/system/ours.service").read_bytes() == good


def test_what_changed_since_the_plan_is_refused(host):
    seen = host.snapshot(bundle(CONFIG))
    (host.root / "etc/a").mkdir(parents=True)
    (host.root / "etc/a/a.conf").write_text("by hand")
    assert host.failure(bundle(CONFIG), seen) == (
        "/etc/a/a.conf: changed since the plan was made; plan again"
    )
    assert (host.root / "etc/a/a.conf").read_text() == "by hand"


def test_a_plan_older_than_another_run_is_refused(host):
    seen = host.snapshot(bundle(CONFIG))
    host.apply(bundle(SITE))
    assert host.failure(bundle(CONFIG), seen).startswith("another run was here")
    assert (host.root / "etc/nginx/site.conf").exists()


def test_a_package_may_bring_a_file_that_is_then_ours(host):
    bring = "mkdir -p $INFERFLEET_ROOT/etc/a && echo stock >$INFERFLEET_ROOT/etc/a/a.conf"
    ensure = Ensure("package", "test -e $INFERFLEET_ROOT/etc/a", bring, before=True)
    host.apply(bundle(CONFIG, ensure))
    assert (host.root / "etc/a/a.conf").read_bytes() == CONFIG.content


def test_a_file_that_was_right_already_is_adopted(host):
    (host.root / "etc/a").mkdir(parents=True)
    (host.root / "etc/a/a.conf").write_bytes(CONFIG.content)
    (host.root / "etc/a/a.conf").chmod(0o640)
    assert host.apply(bundle(CONFIG)) == [{"event": "done", "changes": 0, "restarts": 0}]
    assert f"blobs/{CONFIG.digest}" in host.remembered()
    host.apply(bundle())
    assert set(host.tree()) == {"etc", "etc/a"}, "folders that were there stay"


def test_the_last_five_generations_are_kept_with_their_contents(host):
    for number in range(8):
        host.apply(bundle(Artefact("/etc/n", b"%d" % number)))
    kept = {name for name in host.remembered() if "/" in name}
    assert {name for name in kept if "gen" in name} == {
        f"generations/{n}.json" for n in range(4, 9)
    }
    blobs = {f"blobs/{Artefact('', b'%d' % n).digest}" for n in range(3, 8)}
    assert {name for name in kept if "blobs" in name} == blobs
    current = json.loads((host.root / "var/lib/inferfleet/current.json").read_text())
    assert (current["generation"], current["phase"]) == (8, "pilot")


def test_what_is_remembered_is_for_root_alone(host):
    host.apply(bundle(CONFIG))
    state = host.root / "var/lib/inferfleet"
    modes = {p.stat().st_mode & 0o077 for p in (state, *state.rglob("*"))}
    assert modes == {0}


def test_a_new_phase_with_the_same_files_is_remembered(host):
    host.apply(bundle(CONFIG))
    assert host.apply(bundle(CONFIG, phase="production"))[-1]["changes"] == 0
    assert host.snapshot(bundle()).phase == "production"


def test_two_at_once_the_second_is_told_who_was_first(host):
    waits = bundle(Ensure("gate", "touch $FAKE/in; test -e $FAKE/go", timeout=30))
    with host.session() as first:
        seen = first.ask(waits)
        first.send(*wire.request(waits, seen, owner="ana", reason="pilot"))
        assert next(wire.events("gpu-1", first.lines))["state"] == "running"
        assert host.snapshot(bundle()).lock.startswith("ana since 20")
        assert re.fullmatch(r"locked by ana since 20.* \(pilot\)", host.failure(bundle(), seen))
        (host.fake / "go").touch()
        assert list(wire.events("gpu-1", first.lines))[-1]["event"] == "done"
    assert host.snapshot(bundle()).lock == ""


def test_a_folder_is_told_what_it_leaves_out(host):
    host.runs = False
    pieces = (
        UNIT,
        SITE,
        Artefact("/etc/v", b"", validate=("false",)),
        Ensure("e", "false", "false"),
    )
    events = host.apply(bundle(*pieces))
    assert events[-2] == {
        "event": "left_out",
        "validators": 1,
        "ensures": 1,
        "units": ["a.service", "nginx.service"],
    }
    assert host.calls() == []
    assert host.snapshot(bundle(*pieces)).owed == ()


PYTHONS = [*Path.home().glob(".pyenv/versions/3.8.*/bin/python3"), Path("/usr/bin/python3.8")]


@pytest.mark.skipif(not any(p.exists() for p in PYTHONS), reason="needs Python 3.8")
def test_the_oldest_python_will_do(host):
    (host.fake / "bin/python3").unlink()
    (host.fake / "bin/python3").symlink_to(next(p for p in PYTHONS if p.exists()))
    assert host.snapshot(bundle()).python == "3.8"
    pieces = (UNIT, CONFIG, Ensure("e", "test -e $FAKE/e", "touch $FAKE/e", before=True))
    assert host.apply(bundle(*pieces))[-1] == {"event": "done", "changes": 3, "restarts": 1}
    assert host.apply(bundle())[-1]["changes"] == 2
    assert "ran out of time" in host.failure(bundle(Ensure("w", "false", timeout=1)))
