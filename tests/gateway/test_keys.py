"""Keys: who is let in, what a change of the file does, and what a bad file is told."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from inferfleet.gateway.keys import ANYONE, KeysError, bearer, entry, new_key
from inferfleet.gateway.keys import Keys as KeyFile

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()


def put(path, *entries, mode=0o640):
    """Replaces the file as an administrator's tool does: a new one, renamed into place."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"keys": [json.loads(one) for one in entries]}))
    new.chmod(mode)
    new.replace(path)


def entry_with(name, key, **more):
    return json.dumps(json.loads(entry(name, key)) | more)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def test_a_key_is_found_by_what_was_presented_and_by_nothing_else(path):
    put(path, entry_with("alice", "sk-a", models=["m"], concurrency=3), entry("bob", "sk-b"))
    keys = KeyFile(path)
    alice, bob = keys.find(b"sk-a", NOW), keys.find(b"sk-b", NOW)
    assert (alice.name, alice.models, alice.concurrency) == ("alice", {"m"}, 3)
    assert alice.allows("m")
    assert not alice.allows("other")
    assert (bob.name, bob.models, bob.requests_per_minute) == ("bob", None, None)
    assert bob.allows("other")
    for wrong in (b"", b"sk-", b"sk-a ", b"SK-A", alice.digest, alice.digest.hex().encode()):
        assert keys.find(wrong, NOW) is None
    assert keys.find(b"x" * 100_000, NOW) is None


def test_an_empty_models_list_allows_none(path):
    put(path, entry_with("alice", "sk-a", models=[]))
    assert not KeyFile(path).find(b"sk-a", NOW).allows("m")


def test_without_a_file_anyone_may_ask():
    keys = KeyFile(None)
    assert keys.find(b"", NOW) is keys.find(b"whatever", NOW) is ANYONE
    assert ANYONE.allows("m")
    assert not keys.refresh()


@pytest.mark.parametrize(
    ("expires", "good"),
    [
        ("2026-11-21", True),
        ("2026-11-20", False),  # it ends where that day begins
        ("2026-11-20T12:00:01Z", True),
        ("2026-11-20T12:00:00Z", False),
        ("2026-11-20T13:30:00+02:00", False),
        ("2026-11-20T12:30:00", True),
    ],
)
def test_an_expired_key_is_unknown(path, expires, good):
    put(path, entry_with("alice", "sk-a", expires=expires))
    assert (KeyFile(path).find(b"sk-a", NOW) is not None) is good


def test_a_key_that_is_gone_from_the_file_is_refused_from_then_on(path):
    put(path, entry("alice", "sk-a"), entry("bob", "sk-b"))
    keys = KeyFile(path)
    assert not keys.refresh()
    put(path, entry("bob", "sk-b"), entry("carol", "sk-c"))
    assert keys.refresh()
    assert [
        key and key.name for key in (keys.find(k, NOW) for k in (b"sk-a", b"sk-b", b"sk-c"))
    ] == [
        None,
        "bob",
        "carol",
    ]
    assert not keys.refresh()


@pytest.mark.parametrize("broken", ["cut", "gone", "open to others"])
def test_a_broken_file_keeps_the_old_keys_and_is_told_once(path, caplog, broken):
    put(path, entry("alice", "sk-a"))
    keys = KeyFile(path)
    if broken == "cut":
        path.write_text('{"keys": [')
    elif broken == "gone":
        path.unlink()
    else:
        path.chmod(0o644)
    assert not keys.refresh()
    assert not keys.refresh()
    assert keys.find(b"sk-a", NOW).name == "alice"
    told = [one.getMessage() for one in caplog.records if one.name == "inferfleet.gateway"]
    assert [str(path) in message for message in told] == [True]
    assert str(path) in keys.problem

    put(path, entry("bob", "sk-b"))
    assert keys.refresh()
    assert keys.problem == ""
    assert keys.find(b"sk-a", NOW) is None


def test_a_mended_mode_is_noticed_though_the_content_is_the_same(path):
    put(path, entry("alice", "sk-a"))
    keys = KeyFile(path)
    put(path, entry("bob", "sk-b"), mode=0o644)
    assert not keys.refresh()
    path.chmod(0o600)
    assert keys.refresh()
    assert keys.find(b"sk-b", NOW).name == "bob"


@pytest.mark.parametrize("mode", [0o601, 0o602, 0o604, 0o644, 0o666])
def test_a_file_that_others_can_use_is_refused_with_the_cure(path, mode):
    put(path, entry("alice", "sk-a"), mode=mode)
    with pytest.raises(KeysError) as error:
        KeyFile(path)
    assert str(error.value).startswith(f"{path}: ")
    cure = str(error.value).split("run: ")[1]
    subprocess.run(cure, shell=True, check=True)
    assert path.stat().st_mode & 0o777 == mode & 0o770
    assert KeyFile(path).find(b"sk-a", NOW)


GOOD = json.loads(entry("alice", "sk-a"))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([GOOD, GOOD | {"sha256": "0" * 64}], "two keys have the name alice"),
        ([GOOD, GOOD | {"name": "bob"}], "alice and bob are the same key"),
        ([GOOD | {"sha256": GOOD["sha256"].upper()}, GOOD | {"name": "bob"}], "the same key"),
        ([GOOD, GOOD | {"name": "bob", "sha256": "12"}], "$.keys[1].sha256"),
        ([GOOD | {"sha256": "sk-a"}], "$.keys[0].sha256"),
        ([GOOD | {"key": "sk-a"}], "unknown field `key`"),
        ([GOOD | {"concurrency": 0}], "$.keys[0].concurrency"),
        ([GOOD | {"requests_per_minute": -1}], "$.keys[0].requests_per_minute"),
        ([GOOD | {"tokens_per_day": 1.5}], "$.keys[0].tokens_per_day"),
        ([GOOD | {"expires": "soon"}], "'soon' is neither a date nor a time"),
        ([GOOD | {"name": "a\nb"}], "$.keys[0].name"),
        ([GOOD | {"name": "alice\n"}], "$.keys[0].name"),
        ([{"name": "alice"}], "sha256"),
        ({"alice": GOOD}, "$.keys"),
    ],
)
def test_a_bad_file_is_told_where(path, entries, said):
    path.write_text(json.dumps({"keys": entries}))
    path.chmod(0o600)
    with pytest.raises(KeysError) as error:
        KeyFile(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"keys": null}', b"null"])
def test_what_is_no_keys_file_is_an_error_of_its_kind(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeysError):
        KeyFile(path)


def test_a_missing_file_is_an_error_with_its_path(path):
    with pytest.raises(KeysError, match=re.escape(f"{path}: No such file")):
        KeyFile(path)


@pytest.mark.parametrize(
    ("headers", "presented"),
    [
        ([], b""),
        ([(b"authorization", b"Bearer sk-a")], b"sk-a"),
        ([(b"authorization", b"bearer   sk-a ")], b"sk-a"),
        ([(b"authorization", b"BEARER sk-a")], b"sk-a"),
        ([(b"authorization", b"Basic c2stYQ==")], b""),
        ([(b"authorization", b"sk-a")], b""),
        ([(b"authorization", b"Bearer")], b""),
        ([(b"x-api-key", b"sk-a")], b"sk-a"),
        ([(b"api-key", b" sk-a")], b"sk-a"),
        ([(b"api-key", b"sk-b"), (b"authorization", b"Bearer sk-a")], b"sk-a"),
        ([(b"authorization", b"Basic eA=="), (b"x-api-key", b"sk-b")], b"sk-b"),
        ([(b"authorization", b"Bearer "), (b"x-api-key", b"sk-b")], b"sk-b"),
    ],
)
def test_the_key_is_taken_from_the_headers_clients_use(headers, presented):
    assert bearer([(b"host", b"gw.example.com"), *headers]) == presented


def test_new_keys_are_long_and_differ():
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", key) for key in made)


def test_the_command_prints_a_key_and_an_entry_that_lets_it_in(path):
    argv = [sys.executable, "-m", "inferfleet.gateway.keys"]
    done = subprocess.run([*argv, "alice"], capture_output=True, text=True, check=True)
    key = re.search(r"^ *(sk-\S+)$", done.stdout, re.M)[1]
    line = re.search(r"^ *(\{.*\})$", done.stdout, re.M)[1]
    assert done.stdout.count(key) == 1
    put(path, line)
    assert KeyFile(path).find(key.encode(), NOW).name == "alice"

    for wrong in ([], ["a", "b"], ["a b"]):
        done = subprocess.run([*argv, *wrong], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr
