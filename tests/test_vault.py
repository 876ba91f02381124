"""Vault strings are read as the real ansible-vault writes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inferfleet import yamlfile
from inferfleet.errors import SecretError
from inferfleet.secrets import Secrets
from inferfleet.vault import decrypt

VAULT = Path(sys.executable).with_name("ansible-vault")
PASSWORD = "correct horse\n"


@pytest.fixture(scope="module")
def ansible(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vault")
    (folder / "password").write_text(PASSWORD)
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "ANSIBLE_LOCAL_TEMP": str(folder),
        "LC_ALL": "C.UTF-8",
    }

    def run(*arguments, text=""):
        return subprocess.run(
            [VAULT, *arguments],
            cwd=folder,
            env=environ,
            input=text,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def encrypted(ansible):
    return ansible("encrypt", "--vault-password-file", "password", "-", text="s3cret ü\n")


def test_reads_what_ansible_vault_encrypts(encrypted):
    assert encrypted.startswith("$ANSIBLE_VAULT;1.1;AES256\n")
    assert decrypt(encrypted, PASSWORD.strip().encode()) == "s3cret ü\n".encode()


def test_reads_format_1_2_with_a_label(ansible):
    text = ansible("encrypt", "--vault-id", "prod@password", "-", text="x" * 1000)
    assert text.startswith("$ANSIBLE_VAULT;1.2;AES256;prod\n")
    assert decrypt(text, PASSWORD.strip().encode()) == b"x" * 1000


def test_encrypt_string_pasted_into_a_file_resolves(ansible, tmp_path):
    printed = ansible(
        "encrypt_string",
        "--vault-password-file",
        "password",
        "--name",
        "api_key",
        "sk-16-bytes-long",
    )
    assert printed.startswith("api_key: !vault |\n")
    path = tmp_path / "secrets.yml"
    path.write_text(f"deployments:\n  coder:\n{indented(printed)}\n    port: 8000\n")
    document, problems = yamlfile.load(path, shown="secrets.yml")
    assert not problems
    secret = document.data["deployments"]["coder"]["api_key"]
    secrets = Secrets(tmp_path, vault_password_file=ansible.folder / "password")
    assert secrets.resolve(secret) == "sk-16-bytes-long"
    assert str(secret) == "<secret vault:string>"


def indented(text):
    return "\n".join(f"    {line}" for line in text.rstrip("\n").split("\n"))


def test_wrong_password(encrypted):
    with pytest.raises(SecretError, match="wrong vault password, or the vault string was changed"):
        decrypt(encrypted, b"guess")


def test_changed_ciphertext_is_refused(encrypted):
    text = encrypted.rstrip()
    other = "31" if text.endswith("30") else "30"  # still hex of a hex digit
    with pytest.raises(SecretError, match="wrong vault password, or"):
        decrypt(text[:-2] + other, PASSWORD.strip().encode())


def without_its_last_line(text):
    return text.rstrip().rpartition("\n")[0]


def not_hex(text):
    return text[:200] + "zz" + text[202:]


def one_digit_short(text):
    return text.rstrip()[:-1]


def header_alone(text):
    return text.split("\n")[0]


def not_ascii(text):
    return text[:200] + "é" + text[201:]


@pytest.mark.parametrize(
    "damage", [without_its_last_line, not_hex, one_digit_short, header_alone, not_ascii]
)
def test_damaged_text_is_not_called_a_wrong_password(encrypted, damage):
    with pytest.raises(SecretError, match="the vault string is damaged"):
        decrypt(damage(encrypted), PASSWORD.strip().encode())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not an Ansible Vault string"),
        ("hunter2", "not an Ansible Vault string"),
        ("$ANSIBLE_VAULT;1.0;AES\n00", "format 1.0 AES cannot be read"),
        ("$ANSIBLE_VAULT;9\n00", "format 9"),
    ],
)
def test_other_text(text, said):
    with pytest.raises(SecretError, match=said):
        decrypt(text, b"x")
