"""Secrets are resolved once, by reference, and never shown."""

import os
import shlex
import subprocess
import sys
import threading
import traceback

import pytest

from inferfleet.errors import SecretError
from inferfleet.model import Secret
from inferfleet.secrets import Masked, Secrets, looks_like_secret, scrub

VALUE = "v4lue-that-nobody-may-see"


def python(program):
    """A `!cmd` secret that runs a Python program."""
    return Secret("cmd", shlex.join([sys.executable, "-c", program]))


@pytest.fixture
def secrets(tmp_path):
    return Secrets(tmp_path, environ={"KEY": VALUE, "EMPTY": "", "BAD": "a\udcffb"}, timeout=20)


def private(path, content):
    path.write_bytes(content)
    path.chmod(0o600)


# Environment


def test_env(secrets):
    assert secrets.resolve(Secret("env", "KEY")) == VALUE


def test_env_is_the_process_environment_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("INFERFLEET_TEST_KEY", VALUE)
    assert Secrets(tmp_path).resolve(Secret("env", "INFERFLEET_TEST_KEY")) == VALUE


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GONE", "<secret env:GONE>: the environment variable GONE is not set"),
        ("EMPTY", "<secret env:EMPTY>: is empty"),
        ("BAD", "<secret env:BAD>: is binary, not UTF-8 text"),
    ],
)
def test_env_that_cannot_be_used(secrets, name, said):
    with pytest.raises(SecretError) as caught:
        secrets.resolve(Secret("env", name))
    assert str(caught.value) == said


# Files


@pytest.mark.parametrize(
    ("content", "value"),
    [(b"a\n", "a"), (b"a\n\n", "a\n"), (b"a\r\n", "a"), (b" a b ", " a b "), (b"a\nb\n", "a\nb")],
)
def test_file_loses_one_newline_at_its_end(secrets, tmp_path, content, value):
    private(tmp_path / "key", content)
    assert secrets.resolve(Secret("file", "key")) == value
    assert secrets.bytes_of(Secret("file", "key")) == content
    assert secrets.warnings == []


def test_file_of_an_absolute_path_and_of_home(secrets, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    private(tmp_path / "home/key", b"mine\n")
    assert secrets.resolve(Secret("file", "~/key")) == "mine"
    assert secrets.resolve(Secret("file", str(tmp_path / "home/key"))) == "mine"


def test_binary_file(secrets, tmp_path):
    private(tmp_path / "key", b"\x00\xff\n")
    assert secrets.bytes_of(Secret("file", "key")) == b"\x00\xff\n"
    with pytest.raises(SecretError, match="is binary, not UTF-8 text"):
        secrets.resolve(Secret("file", "key"))


def test_file_that_everyone_can_read_is_a_warning(secrets, tmp_path):
    private(tmp_path / "key", b"x")
    (tmp_path / "key").chmod(0o644)
    assert secrets.resolve(Secret("file", "key")) == "x"
    assert secrets.resolve(Secret("file", "key")) == "x"
    path = tmp_path / "key"
    assert secrets.warnings == [f"{path} can be read by everyone: chmod 600 {path}"]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("gone", "cannot be read: no such file or directory"),
        ("folder", "is a folder"),
        ("fifo", "is not a regular file"),
        ("loop", "symbolic links"),
        ("empty", "<secret file:empty>: is empty"),
        ("newline", "<secret file:newline>: is empty"),
        ("huge", "is larger than 1 MiB"),
        ("nul\0", "cannot be read"),
        ("~nobody-of-that-name/key", "home folder is not known"),
    ],
)
def test_file_that_cannot_be_used(secrets, tmp_path, reference, said):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    private(tmp_path / "empty", b"")
    private(tmp_path / "newline", b"\n")
    private(tmp_path / "huge", b"x" * (2**20 + 1))
    with pytest.raises(SecretError, match=said):
        secrets.resolve(Secret("file", reference))


# Commands


def test_command_runs_in_the_inventory_folder_without_a_shell(secrets, tmp_path):
    assert secrets.resolve(Secret("cmd", "pwd")) == str(tmp_path)
    assert secrets.resolve(Secret("cmd", "echo '$HOME' | cat")) == "$HOME | cat"


def test_command_can_ask_on_its_standard_input(tmp_path):
    program = (
        "from inferfleet.secrets import Secrets, Secret; from pathlib import Path\n"
        "print(Secrets(Path('.')).resolve(Secret('cmd', 'head -n 1')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input="typed\n", capture_output=True, text=True, check=True
    )
    assert done.stdout == "typed\n"


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        (
            python(f"import sys; print('{VALUE}'); sys.exit('first\\nno such entry')"),
            "no such entry$",
        ),
        (python("import sys; sys.exit(3)"), "failed with exit status 3$"),
        (python("pass"), "is empty$"),
        (
            Secret("cmd", "no-such-program-anywhere x"),
            "no-such-program-anywhere cannot be run: no such",
        ),
        (Secret("cmd", "echo 'x"), "no closing quotation$"),
        (Secret("cmd", " "), "the command is empty$"),
        (Secret("cmd", "/"), "/ cannot be run: permission denied$"),
    ],
)
def test_command_that_fails(secrets, secret, said):
    with pytest.raises(SecretError, match=said) as caught:
        secrets.resolve(secret)
    assert str(caught.value).startswith("<secret cmd:")


def test_command_that_does_not_end(tmp_path):
    with pytest.raises(SecretError, match=r"sleep did not end within 0\.1 seconds"):
        Secrets(tmp_path, timeout=0.1).resolve(Secret("cmd", "sleep 60"))


# Vault passwords (what they decrypt is tested with the real ansible-vault)

VAULT = Secret("vault", "$ANSIBLE_VAULT;1.1;AES256\n00")


def test_vault_without_a_password_names_the_variable(secrets):
    with pytest.raises(SecretError, match="ANSIBLE_VAULT_PASSWORD_FILE"):
        secrets.resolve(VAULT)


@pytest.mark.parametrize(
    ("content", "mode", "password"),
    [
        (b" s p \n", 0o600, b"s p"),
        (b"#!/bin/sh\nprintf ' s p \\n'\n", 0o700, b" s p "),
    ],
)
def test_vault_password_is_read_or_printed_as_ansible_does(tmp_path, content, mode, password):
    path = tmp_path / "password"
    path.write_bytes(content)
    path.chmod(mode)
    by_argument = Secrets(tmp_path, vault_password_file=path, environ={})
    by_variable = Secrets(tmp_path, environ={"ANSIBLE_VAULT_PASSWORD_FILE": str(path)})
    assert by_argument._vault_password() == by_variable._vault_password() == password


def test_vault_password_file_gone_or_empty(tmp_path):
    with pytest.raises(SecretError, match="cannot be read: no such file"):
        Secrets(tmp_path, vault_password_file=tmp_path / "gone").resolve(VAULT)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SecretError, match="empty password"):
        Secrets(tmp_path, vault_password_file=tmp_path / "empty").resolve(VAULT)


# Once, and never shown


def counting(path, ending):
    return python(f"open({str(path)!r}, 'a').write('x'); {ending}")


@pytest.mark.parametrize("ending", ["print('value')", "raise SystemExit('locked')"])
def test_each_secret_is_resolved_once_also_by_many_threads(secrets, tmp_path, ending):
    secret = counting(tmp_path / "runs", ending)
    answers = []

    def ask():
        try:
            answers.append(secrets.resolve(secret))
        except SecretError as error:
            answers.append(str(error).rpartition(": ")[2])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "runs").read_text() == "x"
    assert answers == ["value" if "print" in ending else "locked"] * 8


def test_no_value_in_repr_or_traceback(secrets, tmp_path):
    private(tmp_path / "key", VALUE.encode() + b"\xff")
    assert VALUE not in repr(secrets)
    with pytest.raises(SecretError) as caught:
        secrets.resolve(Secret("file", "key"))
    shown = "".join(traceback.format_exception(caught.value))
    assert VALUE not in shown
    assert caught.value.__context__ is None  # UnicodeDecodeError holds what it could not decode


def test_masked_reads_nothing():
    for secret in (Secret("env", "GONE"), Secret("file", "/gone"), Secret("cmd", "false"), VAULT):
        assert Masked().resolve(secret) == str(secret)
        assert Masked().bytes_of(secret) == str(secret).encode()


def test_scrub(tmp_path):
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqh\nkiG9w0BAQEFAASCBK\n-----END PRIVATE"
    environ = {
        "A": "alpha-1",
        "LONGER": "alpha-1-2",
        "Q": 'quo"ted',
        "PIN": "123",
        "K": key,
        "M": "secret",
    }
    secrets = Secrets(tmp_path, environ=environ)
    assert scrub("alpha-1", secrets) == "alpha-1"  # not resolved, so not known
    for name in environ:
        secrets.resolve(Secret("env", name))
    assert scrub("alpha-1, alpha-1-2!", secrets) == "<secret env:A>, <secret env:LONGER>!"
    assert scrub('{"x": "quo\\"ted"} quo"ted', secrets) == '{"x": "<secret env:Q>"} <secret env:Q>'
    assert scrub("port 123", secrets) == "port 123"
    assert scrub("bad line: kiG9w0BAQEFAASCBK", secrets) == "bad line: <secret env:K>"
    assert scrub("secret alpha-1", secrets) == "<secret env:M> <secret env:A>"
    assert scrub("", secrets) == ""


# Secrets in clear

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("password", "hunter2"),
        ("become_password", "hunter2"),
        ("sudoPassword", "hunter2"),
        ("passwd", "x"),
        ("api_key", "abc123"),
        ("api-key", "abc123"),
        ("apikey", "abc123"),
        ("X-API-Key", "abc123"),
        ("OPENAI_API_KEY", "abc"),
        ("hf_token", "abc"),
        ("HF_TOKEN", "abc"),
        ("token", "abc"),
        ("client_secret", "abc"),
        ("secretKey", "dGhpcyBpcw=="),
        ("private_key", "abc"),
        ("credentials", "me:mine"),
        ("note", "hf_AbCdEfGhIjKlMnOpQrStUv"),
        ("note", "sk-proj-AbCdEfGhIjKlMnOpQr"),
        ("note", "ghp_AbCdEfGhIjKlMnOpQrStUv"),
        ("note", "AKIAABCDEFGHIJKLMNOP"),
        ("note", "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA"),
        ("note", "-----BEGIN PRIVATE KEY-----\nAAAA"),
        ("note", JWT),
        ("headers", "Authorization: Bearer abc123def456ghi"),
        ("url", "https://me:mine@mirror.example.com/simple"),
        ("proxy", "http://:mine@192.0.2.1:3128"),
        ("extra_args", "--api-key=abc123"),
        ("extra_args", "--api-key abc123"),
        ("environment", "HF_TOKEN=abc123"),
        ("password", "/run/x --then hf_AbCdEfGhIjKlMnOpQrStUv"),
    ],
)
def test_looks_like_secret(key, value):
    assert looks_like_secret(key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tokens", "512"),
        ("tokenizer", "x"),
        ("tokenizer_mode", "auto"),
        ("secret_name", "pilot"),
        ("password_file", "keys/password"),
        ("token_env", "HF_TOKEN"),
        ("eos_token", "</s>"),
        ("pad_token", "<pad>"),
        ("public_key", "abc"),
        ("key", "abc"),
        ("keyboard", "de"),
        ("private_key", "~/.ssh/id_ed25519"),
        ("private_key", "/etc/inferfleet/tls.key"),
        ("private_key", "tls.pem"),
        ("api_key", "secrets/api-key"),
        ("api_key", ""),
        ("api_key", "${API_KEY}"),
        ("api_key", "{{ api_key }}"),
        ("api_key", "<secret env:API_KEY>"),
        ("auth_key", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB me@example.com"),
        ("secret", "-----BEGIN CERTIFICATE-----\nMIIB"),
        ("note", "-----BEGIN PUBLIC KEY-----\nMIIB"),
        ("host_keys", "SHA256:uNiVztksCsDhcc0u9e8BrqXVUxxxxxxxxxxxxxxxxxxx"),
        ("url", "https://mirror.example.com/simple"),
        ("token", "https://vault.example.com/v1/token"),
        ("url", "https://mirror.example.com:8443/a@b"),
        ("revision", "8ef9c2b3a1d04f5e6b7a8c9d0e1f2a3b4c5d6e7f"),
        ("why", "token bucket"),
        ("why", "Bearer authentication in front of it, see the wiki"),
        ("repository", "Qwen/Qwen2.5-Coder-32B-Instruct-AWQ"),
        ("name", "task-force-and-risk-management"),
        ("environment", "HF_HUB_ENABLE_HF_TRANSFER=1"),
        ("extra_args", "--max-num-batched-tokens=8192"),
    ],
)
def test_does_not_look_like_secret(key, value):
    assert not looks_like_secret(key, value)
