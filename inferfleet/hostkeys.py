"""Which host keys are known, and what to say about one that is not.

The file format is sshd(8)'s, "SSH_KNOWN_HOSTS FILE FORMAT". The reader is our own because
paramiko's takes 4.6 s for 10,000 lines. Nothing here touches the network or needs paramiko.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from inferfleet.errors import Error

ALGORITHMS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}  # key type -> signature algorithms, in the order we like them
CERTIFICATE = "-cert-v01@openssh.com"
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class HostKey:
    """A key a host showed: its type, "SHA256:..." and the known_hosts line that trusts it."""

    type: str
    fingerprint: str
    line: str


class Entry(NamedTuple):
    """One known key. `marker` is "", "@revoked" or "@cert-authority"; `key` is base64."""

    marker: str
    type: str
    key: str


def fingerprint_of(blob: bytes) -> str:
    """The SHA-256 fingerprint of a public key's wire form, as `ssh-keygen -lf` prints it."""
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return f"SHA256:{digest}"


def known_name(address: str, port: int) -> str:
    """How known_hosts files call a server."""
    return address.lower() if port == 22 else f"[{address.lower()}]:{port}"


def _is_pattern(names: str) -> bool:
    return any(sign in names for sign in "*?!")


def _matches(patterns: str, name: str) -> bool:
    """Whether a comma list with `*`, `?` and `!` names `name`; one negated match settles it."""
    found = False
    for pattern in patterns.lower().split(","):
        escaped = re.escape(pattern.removeprefix("!"))
        glob = escaped.replace(r"\*", ".*").replace(r"\?", ".")
        if re.fullmatch(glob, name):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _hashed(names: str, name: str) -> bool:
    """Whether `|1|salt|hash` stands for `name`."""
    try:
        salt, digest = (binascii.a2b_base64(part) for part in names.split("|")[2:4])
    except ValueError:
        return False
    return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)


def _split(line: str) -> tuple[str, Entry] | None:
    """The names of a known_hosts line and its entry; None for comments and broken lines."""
    words = line.split()
    marker = words.pop(0) if words and words[0].startswith("@") else ""
    if len(words) < 3 or words[0].startswith("#"):
        return None
    return words[0], Entry(marker, words[1], words[2])


class KnownHosts:
    """The lines of a known_hosts file, looked up by name."""

    def __init__(self, text: str) -> None:
        self._plain: dict[str, list[Entry]] = {}
        self._others: list[tuple[str, Entry]] = []
        for names, entry in filter(None, map(_split, text.splitlines())):
            if names.startswith("|1|") or _is_pattern(names):
                self._others.append((names, entry))
                continue
            for name in names.lower().split(","):
                self._plain.setdefault(name, []).append(entry)

    def find(self, name: str) -> Iterator[Entry]:
        """Every key recorded for `name` (see `known_name`), authorities and revoked included."""
        yield from self._plain.get(name, ())
        for names, entry in self._others:
            if (_hashed if names.startswith("|") else _matches)(names, name):
                yield entry


@lru_cache(maxsize=16)
def _read(path: Path, _stamp: tuple[int, int]) -> KnownHosts:
    return KnownHosts(path.read_text(encoding="utf-8", errors="replace"))


def find(paths: Iterable[Path], name: str) -> tuple[Entry, ...]:
    """All entries for `name` in the files that exist; each is read once, until it changes."""
    found: list[Entry] = []
    for path in paths:
        try:
            stat = path.stat()
            with _LOCK:
                known = _read(path, (stat.st_mtime_ns, stat.st_size))
        except OSError:
            continue
        found += known.find(name)
    return tuple(found)


def preferred(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Signature algorithms to offer a host: what we can check first, as OpenSSH does."""
    entries = tuple(entries)
    plain = [name for names in ALGORITHMS.values() for name in names]
    authorities = any(entry.marker == "@cert-authority" for entry in entries)
    known = {entry.type for entry in entries if not entry.marker}
    first = [name for type_, names in ALGORITHMS.items() if type_ in known for name in names]
    certified = [name + CERTIFICATE for name in plain] if authorities else []
    return (*first, *certified, *(name for name in plain if name not in first))


def _shown(entries: Iterable[Entry]) -> str:
    keys = (f"{fingerprint_of(binascii.a2b_base64(e.key))} ({e.type})" for e in entries)
    return " or ".join(dict.fromkeys(keys))


def _readable(entry: Entry) -> bool:
    try:
        return bool(binascii.a2b_base64(entry.key))
    except binascii.Error:
        return False


def _certified(line: str, name: str, authorities: Sequence[str]) -> bool:
    """Whether a host certificate is signed by one of the authorities, for `name`, and valid."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as forms

    try:
        cert = forms.load_ssh_public_identity(line.encode())
        if not isinstance(cert, forms.SSHCertificate):
            return False
        signer = cert.signature_key().public_bytes(
            forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH
        )
        cert.verify_cert_signature()
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False
    principals = [principal.decode(errors="replace").lower() for principal in cert.valid_principals]
    return (
        signer.split()[1].decode() in authorities
        and cert.type is forms.SSHCertificateType.HOST
        and cert.valid_after <= time.time() < cert.valid_before
        and not cert.critical_options
        and (not principals or any(_matches(principal, name) for principal in principals))
    )


@dataclass(frozen=True, slots=True)
class Expected:
    """What a server's key must be. `name` is as `known_name` gives it.

    `pins` are fingerprints from the inventory; when there are any, only they count.
    `remedy` completes "Compare it on the host's console, then: ".
    """

    address: str
    name: str
    entries: tuple[Entry, ...]
    pins: tuple[str, ...] = ()
    remedy: str = ""

    def objection(self, key_type: str, blob: bytes, certificate: str = "") -> str:
        """Why this key is not accepted, for the user; "" when it is the right one.

        `blob` is the plain key; `certificate` the host certificate as "type base64", if any.
        """
        print_ = fingerprint_of(blob)
        text = base64.b64encode(blob).decode()
        usable = [entry for entry in self.entries if _readable(entry)]
        if any(entry.marker == "@revoked" and entry.key == text for entry in usable):
            return f"its host key is marked as revoked: {print_} ({key_type}). Do not use it"
        if self.pins:
            return "" if print_ in self.pins else self._mismatch(print_, key_type)
        known = [entry for entry in usable if not entry.marker]
        if any(entry.key == text for entry in known) or self._vouched(certificate, usable):
            return ""
        if known:
            return self._changed(print_, key_type, known)
        return (
            f"its host key is unknown: {print_} ({key_type}). "
            f"Compare it on the host's console, then: {self.remedy}"
        )

    def _vouched(self, certificate: str, usable: list[Entry]) -> bool:
        revoked = {entry.key for entry in usable if entry.marker == "@revoked"}
        authorities = [e.key for e in usable if e.marker == "@cert-authority"]
        trusted = [key for key in authorities if key not in revoked]
        return bool(certificate) and _certified(certificate, self.address.lower(), trusted)

    def _mismatch(self, print_: str, key_type: str) -> str:
        return (
            f"its host key is not one of the inventory's host_keys: it showed {print_} "
            f"({key_type}), expected {' or '.join(self.pins)}. This may be an attack. If the host "
            "was reinstalled, compare the key on its console, then correct host_keys"
        )

    def _changed(self, print_: str, key_type: str, known: list[Entry]) -> str:
        return (
            f"its host key has changed: it showed {print_} ({key_type}), expected "
            f"{_shown(known)}. This may be an attack. If the host was reinstalled, "
            f"compare the key on its console, then: {self.remedy} --replace"
        )


def _without(line: str, name: str) -> str:
    """A known_hosts line that no longer names `name`; "" when nothing is left of it."""
    found = _split(line)
    if found is None or found[1].marker or _is_pattern(found[0]):
        return line
    names = found[0]
    if names.startswith("|"):
        return "" if _hashed(names, name) else line
    kept = [other for other in names.split(",") if other.lower() != name]
    return line.replace(names, ",".join(kept), 1) if kept else ""


def trust(text: str, keys: Iterable[HostKey], *, replace: bool = False) -> str:
    """The known_hosts `text` with the keys added; with `replace`, instead of the old ones.

    Raises Error when another key of the same type is recorded and `replace` is not set.
    """
    for name, wanted in _by_name(keys).items():
        known = [e for e in KnownHosts(text).find(name) if not e.marker]
        types = {entry.type: entry.key for entry in wanted}
        if replace:
            text = "".join(_without(line, name) for line in text.splitlines(keepends=True))
            known = [e for e in KnownHosts(text).find(name) if not e.marker]
        elif any(e.key != types.get(e.type, e.key) for e in known):
            raise Error(f"another host key is recorded for {name}; replace it with --replace")
        head = text if not text or text.endswith("\n") else text + "\n"
        new = (e for e in wanted if e not in known)
        text = head + "".join(f"{name} {entry.type} {entry.key}\n" for entry in new)
    return text


def _by_name(keys: Iterable[HostKey]) -> dict[str, list[Entry]]:
    names: dict[str, list[Entry]] = {}
    for found in filter(None, (_split(key.line) for key in keys)):
        names.setdefault(found[0], []).append(found[1])
    return names
