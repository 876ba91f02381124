"""Resolves secrets from their references, when pushing and never before; masks them elsewhere.

No value goes into an exception, a repr or a file. `looks_like_secret` finds those written in clear.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from inferfleet.errors import SecretError
from inferfleet.model import Secret
from inferfleet.vault import decrypt

__all__ = ["Masked", "Secrets", "Tolerant", "looks_like_secret", "scrub"]

_LONGEST = 2**20  # bytes of a secret
_PASSWORD_FILE = "ANSIBLE_VAULT_PASSWORD_FILE"  # noqa: S105


class Masked:
    """Gives the mask, never a value, and reads nothing."""

    def resolve(self, secret: Secret) -> str:
        """`<secret kind:reference>`."""
        return str(secret)

    def bytes_of(self, secret: Secret) -> bytes:
        """The same, UTF-8."""
        return str(secret).encode()


class Tolerant:
    """`secrets` where they can be resolved, else the mask: enough to plan with.

    `unresolved` tells why the others cannot be.
    """

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self.unresolved: dict[Secret, str] = {}

    def resolve(self, secret: Secret) -> str:
        """The value or the mask."""
        try:
            return self._secrets.resolve(secret)
        except SecretError as error:
            self.unresolved[secret] = str(error)
            return str(secret)

    def bytes_of(self, secret: Secret) -> bytes:
        """The value or the mask, UTF-8."""
        try:
            return self._secrets.bytes_of(secret)
        except SecretError as error:
            self.unresolved[secret] = str(error)
            return str(secret).encode()


class Secrets:
    """Resolves each secret once, and remembers it, or its failure, for this object's life.

    `folder` is the inventory's: relative files, and commands, start there. `warnings` collects what
    a user should mend, such as a secret file that everyone can read. Threads may share one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vault_password_file: Path | None = None,
        environ: Mapping[str, str] | None = None,
        timeout: float = 60,  # seconds a command may take
    ) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self._environ = os.environ if environ is None else environ
        self._password_file = vault_password_file
        self._password: bytes | None = None
        self._timeout = timeout
        self._known: dict[Secret, bytes | str] = {}  # str: why it cannot be resolved
        self._lock = threading.RLock()  # one at a time: a command may ask on the terminal

    def resolve(self, secret: Secret) -> str:
        """The value, without one newline at its end. Raises SecretError."""
        try:
            text = _chomped(self.bytes_of(secret)).decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise SecretError(f"{secret}: is binary, not UTF-8 text")
        if not text:
            raise SecretError(f"{secret}: is empty")
        return text

    def bytes_of(self, secret: Secret) -> bytes:
        """The value as it is. Raises SecretError."""
        with self._lock:
            if secret not in self._known:
                self._known[secret] = self._outcome(secret)
            known = self._known[secret]
        if isinstance(known, str):
            raise SecretError(known)
        return known

    def resolved(self) -> Iterator[tuple[Secret, bytes]]:
        """What has been resolved so far, for `scrub`."""
        with self._lock:
            known = list(self._known.items())
        yield from ((secret, value) for secret, value in known if isinstance(value, bytes))

    def _outcome(self, secret: Secret) -> bytes | str:
        try:
            return self._fetch(secret) or f"{secret}: is empty"
        except SecretError as error:
            return f"{secret}: {error}"

    def _fetch(self, secret: Secret) -> bytes:
        match secret.kind:
            case "env":
                return self._variable(secret.reference)
            case "file":
                return self._file(secret.reference)
            case "cmd":
                return _output(_words(secret.reference), self.folder, self._timeout)
            case "vault":
                return decrypt(secret.reference, self._vault_password())

    def _variable(self, name: str) -> bytes:
        value = self._environ.get(name)
        if value is None:
            raise SecretError(f"the environment variable {name} is not set")
        return value.encode(errors="surrogateescape")

    def _file(self, reference: str) -> bytes:
        path = self._place(reference)
        content = _read(path)
        if path.stat().st_mode & stat.S_IROTH:
            self.warnings.append(
                f"{path} can be read by everyone: chmod 600 {shlex.quote(str(path))}"
            )
        return content

    def _place(self, reference: str) -> Path:
        try:
            return self.folder / Path(reference).expanduser()
        except RuntimeError as error:  # ~nobody-of-that-name
            raise SecretError("that user's home folder is not known") from error

    def _vault_password(self) -> bytes:
        if self._password is None:
            path = self._vault_password_path()
            run = path.is_file() and os.access(path, os.X_OK)
            content = _output([str(path)], self.folder, self._timeout) if run else _read(path)
            self._password = content.strip(b"\r\n") if run else content.strip()  # as Ansible does
        if not self._password:
            raise SecretError("the vault password file gives an empty password")
        return self._password

    def _vault_password_path(self) -> Path:
        if self._password_file is not None:
            return self._place(str(self._password_file)).absolute()
        named = self._environ.get(_PASSWORD_FILE)
        if not named:
            raise SecretError(f"no vault password: name its file in {_PASSWORD_FILE}")
        return Path(named).expanduser().absolute()


def scrub(text: str, secrets: Secrets) -> str:
    """The text with every resolved value of 4 characters or more replaced by its mask.

    A value is also found as JSON writes it, and each long line of a value by itself.
    """
    forms = {form: str(secret) for secret, value in secrets.resolved() for form in _forms(value)}
    if not forms:
        return text
    longest_first = sorted(forms, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: forms[found[0]], text)


def _forms(value: bytes) -> set[str]:
    whole = _chomped(value).decode(errors="replace")
    lines = {line for line in whole.splitlines() if len(line) >= 12 and "-----" not in line}
    return {form for form in {whole, json.dumps(whole)[1:-1], *lines} if len(form) >= 4}


def _chomped(value: bytes) -> bytes:
    return value[:-1].removesuffix(b"\r") if value.endswith(b"\n") else value


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SecretError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}")
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise SecretError(f"{path} cannot be read: {reason.lower()}") from error
    if len(content) > _LONGEST:
        raise SecretError(f"{path} is larger than {_LONGEST // 2**20} MiB: not a secret")
    return content


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SecretError(str(error).lower()) from error
    if not words:
        raise SecretError("the command is empty")
    return words


def _output(argv: list[str], folder: Path, timeout: float) -> bytes:
    """What a command prints; it may ask on the terminal, and its stdout is never shown."""
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise SecretError(f"{argv[0]} did not end within {timeout:g} seconds") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SecretError(f"{argv[0]} cannot be run: {reason.lower()}") from error
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise SecretError(
            f"{argv[0]} failed with exit status {done.returncode}: {last}".rstrip(": ")
        )
    return done.stdout


# Secrets written in clear

_SECRET_NAME = re.compile(
    r"(^|_)(password|passwd|passphrase|pwd|secret|token|credentials?|bearer|"
    r"(api|private|access|secret|auth|encryption|signing|master)_?key)$"
)
_VOCABULARY = re.compile(r"(^|_)(bos|eos|pad|unk|sep|cls|mask|stop|start|end|image|special)_token$")
_SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(
    hf_[A-Za-z0-9]{16,} | sk-[A-Za-z0-9_-]{16,} | nvapi-[A-Za-z0-9_-]{16,}
    | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_[A-Za-z0-9_]{16,} | glpat-[A-Za-z0-9_-]{16,}
    | (AKIA|ASIA)[A-Z0-9]{16} | xox[abprs]-[A-Za-z0-9-]{10,} | AIza[A-Za-z0-9_-]{35}
    | eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+
    | (Bearer|Basic)[ ](?=\S*[0-9=])[A-Za-z0-9+/=._-]{12,}
    ) | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY----- | ://[^/\s:@]*:[^/\s@]+@""",
    re.VERBOSE,
)
_HARMLESS = re.compile(
    r"""(~|\.{1,2})?/[\w.@+~/-]*                      # an absolute path, or one from here or home
    | [a-z0-9._-]+(/[a-z0-9._-]+)+                    # a relative path
    | \S+\.(pem|key|crt|txt|json|ya?ml|env)           # a file name
    | (ssh-|ecdsa-|sk-ssh-)[\w@.-]+\s+AAAA.*          # a public key
    | -----BEGIN\ (?![A-Z ]*PRIVATE).*                # a public key or certificate
    | (SHA256|MD5):\S+                                # a fingerprint
    | [a-z][a-z0-9+.-]*://\S*                         # a URL; one with a password was found before
    | <.*> | \$\{?\w+\}? | \{\{.*\}\}                 # a placeholder
    """,
    re.VERBOSE | re.DOTALL,
)
_ASSIGNMENT = re.compile(r"(?:--(?=\S+ )|(?=\S+=))-*([A-Za-z][\w.-]*)[= ](\S+)")


def looks_like_secret(key: str, value: str) -> bool:
    """Whether a value seems to be a secret in clear, by the name of its key or by its shape."""
    text = value.strip()
    if _SHAPES.search(text):
        return True
    if not text or _HARMLESS.fullmatch(text):
        return False
    assignment = _ASSIGNMENT.fullmatch(text)  # --api-key=..., HF_TOKEN=...
    return _names_secret(key) or bool(assignment and looks_like_secret(*assignment.groups()))


def _names_secret(key: str) -> bool:
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", key).strip("_").lower()
    return bool(_SECRET_NAME.search(name)) and not _VOCABULARY.search(name)
