"""sudo, seen from the other end of its three streams."""

from __future__ import annotations

import secrets
import shlex
import threading
from collections.abc import Callable

WANTED = (
    "sudo asks for {user}'s password: set become_password for the host, "
    "or allow NOPASSWD in sudoers"
)


class Sudo:
    """What sudo says on stderr until it runs the command, which then begins with our mark.

    The password is written when sudo asks for it, once; it is in no argument and no message.
    """

    def __init__(self, user: str, password: str | None = None) -> None:
        token = secrets.token_hex(8)
        self.user = user or "the login user"
        self.decided = threading.Event()
        self.refusal = ""
        self.asks = password is not None
        self._password = password
        self._prompt = f"[inferfleet-{token}-password]".encode()
        self._mark = f"[inferfleet-{token}-running]\n".encode()
        self._said = b""
        self._passed = False

    def wrap(self, command: str) -> str:
        """The command line that runs `command` as root; C locale, to understand its refusals."""
        how = ["-S", "-p", self._prompt.decode()] if self.asks else ["-n"]
        script = f"echo '{self._mark.decode().strip()}' >&2; {command}"
        return shlex.join(["env", "LC_ALL=C", "sudo", *how, "--", "sh", "-c", script])

    def hear(self, data: bytes, answer: Callable[[bytes], None]) -> bytes:
        """What of stderr `data` is the command's own; `answer` writes to sudo's stdin."""
        if self._passed:
            return data
        self._said += data
        if self._prompt in self._said:
            self._said = self._said.replace(self._prompt, b"", 1)
            self._reply(answer)
        _, mark, rest = self._said.partition(self._mark)
        if mark:
            self._passed = True
            self.decided.set()
            return rest
        return b""

    def _reply(self, answer: Callable[[bytes], None]) -> None:
        if self._password is None:
            self._refuse(f"sudo refused the password of {self.user}")
            return
        password, self._password = self._password, None
        answer(password.encode() + b"\n")

    def _refuse(self, why: str) -> None:
        self.refusal = self.refusal or why
        self.decided.set()

    @property
    def lacks_password(self) -> bool:
        """Whether it refused only because it was given no password."""
        return self.refusal == WANTED.format(user=self.user)

    def over(self) -> None:
        """stderr has ended; without the mark, sudo did not let us in."""
        if not self._passed:
            self._refuse(explain(self._said.decode(errors="replace"), self.user))


def explain(said: str, user: str) -> str:
    """One line with a remedy for what sudo (or the shell that looked for it) said."""
    reasons = {
        "incorrect password": f"sudo refused the password of {user}",
        "try again": f"sudo refused the password of {user}",
        "password is required": WANTED.format(user=user),
        "terminal is required": WANTED.format(user=user),
        "sudoers file": f"sudo does not know {user}: add a rule for it to sudoers",
        "not allowed": f"sudo does not allow {user} to run sh as root: add a rule to sudoers",
        "may not run sudo": f"sudo does not allow {user} to run sh as root: add a rule to sudoers",
        "have a tty": "sudo insists on a terminal (requiretty): put "
        f"'Defaults:{user} !requiretty' into sudoers",
        "not found": "sudo is not installed there: install it, or log in as root with become: none",
        "No such file": "sudo is not installed there: install it, or log in as root with "
        "become: none",
    }
    for sign, reason in reasons.items():
        if sign in said:
            return reason
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    return f"sudo did not run the command: {last[0]}"
