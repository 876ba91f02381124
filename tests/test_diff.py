"""What would change on a host, from what is wanted and what was seen there."""

import pytest

from inferfleet.diff import diff, unified
from inferfleet.model import Artefact, Bundle, Change, Ensure, FileState, Host, Snapshot

HOST = Host("web", "192.0.2.1")
UNIT = "/etc/systemd/system/a.service"
A = Artefact("/etc/a", b"new\n", restarts=("a.service",))
KEY = Artefact("/etc/key", b"sesame\n", mode=0o600, secret=True, reloads=("b.service",))
MASKED = Artefact("/etc/key", b"<secret env:KEY>\n", mode=0o600, secret=True)
READY = Ensure("a is ready", "true")


def as_wanted(artefact, **differences):
    """The state of a file that is as it should be, but for the given differences."""
    same = {"kind": "file", "mode": artefact.mode, "owner": "root", "group": "root"}
    return FileState(artefact.path, **(same | {"digest": artefact.digest} | differences))


def found(*wanted, files=(), phase="p", **seen):
    states = {state.path: state for state in files}
    return diff(
        Bundle(HOST, "p", (("role", wanted),)), Snapshot("web", states, phase=phase, **seen)
    )


def test_a_host_that_is_as_wanted_has_no_diff():
    same = found(A, KEY, READY, files=[as_wanted(A), as_wanted(KEY)])
    assert not same
    assert same.restarts == same.reloads == same.stops == same.unknown == ()


@pytest.mark.parametrize(
    ("differences", "detail"),
    [
        ({"digest": "0" * 64}, "content"),
        ({"mode": 0o600}, "mode 0600 -> 0644"),
        ({"owner": "eve"}, "owner eve -> root"),
        ({"group": "wheel"}, "group wheel -> root"),
        ({"owner": "", "group": ""}, None),
        ({"mode": 0o4755, "digest": "0" * 64}, "content, mode 4755 -> 0644"),
        ({"digest": ""}, "content unknown: it cannot be read without root's rights"),
        ({"kind": "symlink", "digest": ""}, "replaces a symlink"),
        ({"kind": "directory", "digest": ""}, "a directory is there: refused"),
    ],
)
def test_a_file_that_differs_is_updated_and_its_unit_restarted(differences, detail):
    difference = found(A, files=[as_wanted(A, **differences)])
    if detail is None:
        assert not difference
    else:
        assert difference.changes == (Change("update", "/etc/a", detail, ("a.service",)),)
        assert difference.restarts == ("a.service",)


@pytest.mark.parametrize("files", [[], [FileState("/etc/a")]])
def test_a_file_that_is_not_there_is_created(files):
    assert found(A, files=files).changes == (Change("create", "/etc/a", units=("a.service",)),)


def test_a_unit_that_restarts_is_not_reloaded_as_well():
    more = Artefact("/etc/more", b"", reloads=("a.service", "b.service"))
    difference = found(more, A, KEY)
    assert (difference.restarts, difference.reloads) == (("a.service",), ("b.service",))


def test_what_is_no_longer_wanted_is_removed_and_its_unit_stopped():
    owned = {UNIT: ("a.service",), "/etc/old": ("a.service",), "/etc/a": ()}
    difference = found(A, files=[as_wanted(A)], owned=owned)
    assert difference.changes == (
        Change("remove", "/etc/old"),
        Change("remove", UNIT, units=("a.service",)),
    )
    assert difference.stops == ("a.service",)


def test_owed_restarts_are_paid_unless_they_happen_anyway():
    difference = found(A, owed=("a.service", "z.service"), interrupted=True)
    assert [(change.kind, change.subject) for change in difference.changes] == [
        ("pay", "an interrupted run"),
        ("pay", "z.service"),
        ("create", "/etc/a"),
    ]


def test_failing_ensures_are_told_by_title_in_order():
    more = Ensure("b is ready", "true")
    difference = found(READY, A, more, files=[as_wanted(A)], failing=frozenset({1, 0}))
    assert [change.subject for change in difference.changes] == ["a is ready", "b is ready"]


@pytest.mark.parametrize(
    ("phase", "owned", "leaves"),
    [("q", {"/etc/a": ()}, "q"), ("p", {"/etc/a": ()}, ""), ("", {}, ""), ("q", {}, "")],
)
def test_a_host_of_another_phase_leaves_it(phase, owned, leaves):
    assert found(A, phase=phase, owned=owned).moves_from == leaves


def test_a_directory_where_a_file_is_wanted_is_refused_with_a_remedy():
    odd = Artefact("/etc/a b", b"")
    states = [FileState(odd.path, "directory"), FileState("/etc/a", "symlink")]
    assert found(A, odd, files=states).refused == (
        "/etc/a b is a directory, and a file is wanted there: "
        "move it away (mv '/etc/a b' '/etc/a b.old')",
    )


def test_a_new_phase_alone_is_a_change_without_restarts():
    moved = found(A, files=[as_wanted(A)], phase="q", owned={"/etc/a": ("a.service",)})
    assert moved.changes == (Change("move", "phase p", "moves from q"),)
    assert moved.restarts == moved.reloads == moved.stops == ()


def test_a_secret_that_cannot_be_resolved_is_not_compared():
    difference = found(MASKED, files=[as_wanted(MASKED, digest="0" * 64, mode=0o640)])
    assert difference.unknown == ("/etc/key",)
    assert [change.detail for change in difference.changes] == ["mode 0640 -> 0600"]


def test_lines_of_a_file_with_secrets_are_not_shown():
    lines = unified(KEY, b"old sesame\n")
    assert not any("sesame" in line for line in lines)


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (b"a\nb\n", b"a\nc\n", [" a", "-b", "+c"]),
        (None, b"a\n", ["+a"]),
        (b"\x1b[2Ja\n", b"a\n", ["-\ufffd[2Ja", "+a"]),
        (b"\xff\xfe", b"a\n", ["-(binary, 2 bytes)", "+a"]),
    ],
)
def test_a_unified_diff_is_fit_for_a_terminal(before, after, shown):
    lines = unified(Artefact("/etc/a", after), before)
    assert lines[0] == ("--- /etc/a" if before is not None else "--- /dev/null")
    assert lines[3:] == shown
