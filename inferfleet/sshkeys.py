"""Logging in: identity files, certificates and the agent, in ssh's order. No passwords."""

from __future__ import annotations

import base64
import binascii
import copy
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as forms
from paramiko.pkey import UnknownKeyType

from inferfleet.sshconfig import Endpoint

_MAGIC = b"openssh-key-v1\0"
_LOCK = threading.Lock()
Identity = tuple[str, paramiko.PKey]  # what to call it, and the key


def authenticate(transport: paramiko.Transport, endpoint: Endpoint) -> None:
    """Log in with the first key that is let in; TransportError says which were tried."""
    notes: list[str] = []
    tried: list[str] = []
    with closing(_agent(notes)) as agent:
        for label, key in _identities(endpoint, agent, notes):
            tried.append(label)
            if _accepted(transport, endpoint, key):
                return
            if not transport.is_active():
                notes.append("the server then ended the connection (MaxAuthTries?)")
                break
    raise endpoint.error(_refused(endpoint.user, tried, notes))


def _refused(user: str, tried: list[str], notes: list[str]) -> str:
    reasons = [f"; {note}" for note in notes]
    if not tried and notes:
        return f"no key to log in with as {user}: {'; '.join(notes)}"
    if not tried:
        return (
            f"no key to log in with as {user}: name one in the inventory (key), "
            "start ssh-agent, or make ~/.ssh/id_ed25519"
        )
    return f"{user} was not let in with {', '.join(tried)}{''.join(reasons)}"


def _accepted(transport: paramiko.Transport, endpoint: Endpoint, key: paramiko.PKey) -> bool:
    user = endpoint.user
    try:
        further = transport.auth_publickey(user, key)
    except paramiko.BadAuthenticationType as error:
        offered = ", ".join(error.allowed_types)
        raise endpoint.error(f"it lets {user} log in only by: {offered}; a key is needed") from None
    except paramiko.AuthenticationException as error:
        if "timeout" in str(error):
            raise endpoint.error(f"the login as {user} timed out") from None
        return False
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise endpoint.error(f"the login as {user} broke off: {error}") from None
    if further:
        raise endpoint.error(f"a key is not enough for {user}; it also wants: {', '.join(further)}")
    return True


def _agent(notes: list[str]) -> paramiko.Agent:
    try:
        return paramiko.Agent()
    except (paramiko.SSHException, OSError) as error:
        notes.append(f"ssh-agent does not answer: {error}")
        agent = paramiko.Agent.__new__(paramiko.Agent)
        paramiko.agent.AgentSSH.__init__(agent)
        return agent


def _identities(endpoint: Endpoint, agent: paramiko.Agent, notes: list[str]) -> Iterator[Identity]:
    """Each identity file's key (the agent's copy of it if there is one), then the agent's rest."""
    held = {key.asbytes(): key for key in agent.get_keys()}
    for path in endpoint.identities:
        public = _public(path)
        key = held.pop(public, None) if public else None
        loaded = key or _private(path, endpoint.named, notes)
        if loaded is not None:
            yield from _variants(path, endpoint.certificates, loaded)
    if not endpoint.only:
        yield from ((f"the agent's key {key.comment}", key) for key in held.values())


def _variants(path: Path, certificates: tuple[Path, ...], key: paramiko.PKey) -> Iterator[Identity]:
    """The key with each certificate for it, then alone."""
    for certificate in (*certificates, Path(f"{path}-cert.pub")):
        if _certifies(certificate, key):
            certified = copy.copy(key)
            certified.load_certificate(str(certificate))
            yield f"certificate {certificate}", certified
    yield f"key {path}", key


def _certifies(path: Path, key: paramiko.PKey) -> bool:
    try:
        certificate = forms.load_ssh_public_identity(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        return False
    if not isinstance(certificate, forms.SSHCertificate):
        return False
    public = certificate.public_key().public_bytes(
        forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH
    )
    return public.split()[1].decode() == key.get_base64()


def _private(path: Path, named: bool, notes: list[str]) -> paramiko.PKey | None:
    """The key in a file; None, and a note, when it cannot be used."""
    try:
        with _LOCK:
            return _load(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        if named:
            notes.append(f"key file {path} does not exist")
    except OSError as error:
        notes.append(f"key file {path} cannot be read: {error.strerror}")
    except (TypeError, paramiko.PasswordRequiredException):
        notes.append(f"key {path} is encrypted and no agent holds it: ssh-add {path}")
    except (ValueError, UnsupportedAlgorithm, UnknownKeyType, paramiko.SSHException):
        notes.append(f"{path} is not a private key we can read")
    return None


@lru_cache(maxsize=64)
def _load(path: Path, _stamp: int) -> paramiko.PKey:
    key = copy.copy(paramiko.PKey.from_path(path))
    key.public_blob = None  # from_path adds PATH-cert.pub; we want the key alone, too
    return key


def _public(path: Path) -> bytes | None:
    """The public part of an identity, also of an encrypted one; None if it cannot be told."""
    for file in (Path(f"{path}.pub"), path):
        try:
            text = file.read_text(encoding="ascii", errors="replace")
            words = text.split(maxsplit=2)
            if words and words[0].startswith(("ssh-", "ecdsa-", "sk-")):
                return base64.b64decode(words[1])
            if "BEGIN OPENSSH PRIVATE KEY" in text:
                return _header(text)
        except (OSError, IndexError, binascii.Error):
            continue
    return None


def _header(text: str) -> bytes | None:
    """The public key before the encrypted part (openssh PROTOCOL.key)."""
    body = "".join(line for line in text.splitlines() if not line.startswith("-"))
    data = base64.b64decode(body)
    if not data.startswith(_MAGIC):
        return None
    message = paramiko.Message(data[len(_MAGIC) :])
    for _ in ("cipher", "kdf", "kdf options"):
        message.get_binary()
    return message.get_binary() if message.get_int() else None
