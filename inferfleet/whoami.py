"""Who runs this, as others read it: in a host's lock, as a login name."""

from __future__ import annotations

import getpass
import os
import socket


def user() -> str:
    """The login name; "" for a uid without one, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        return ""


def owner() -> str:
    """`user@machine`."""
    return f"{user() or f'uid {os.getuid()}'}@{socket.gethostname()}"
