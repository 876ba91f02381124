"""The root file system of the lab's hosts: made once by mmdebstrap, then kept.

It is the suite of the machine it is made on, from that machine's own package sources and proxy.
What is kept is one archive, named after a hash of all that goes into it, and the tree unpacked from
it, which every host uses as the read-only lower layer of an overlay.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from inferfleet.lab.machine import command, exclusive

Say = Callable[[str], None]

# deploy may sudo without a password, asked with one, limited not at all.
USERS = ("root", "deploy", "asked", "limited")
# Of asked and limited, for sudo alone; and the hosts can be reached from this machine alone.
PASSWORD = "lab"  # noqa: S105

PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "libpam-systemd",
    "libnss-systemd",  # names for dynamic users
    "openssh-server",
    "python3",
    "nginx-light",
    "ca-certificates",
    "sudo",
    "iproute2",
    "procps",
    "openssl",
    "curl",
)

OPTIONS = (
    "--variant=minbase",
    "--mode=root",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-include=/usr/share/doc/*/copyright",
)

# nginx would take port 80 from the roles; the rest is noise, or fights over the lab's own network.
MASKED = (
    "nginx.service console-getty.service apt-daily.timer apt-daily-upgrade.timer "
    "dpkg-db-backup.timer e2scrub_all.timer fstrim.timer motd-news.timer "
    "systemd-networkd.service systemd-networkd.socket systemd-networkd-wait-online.service "
    "systemd-resolved.service systemd-timesyncd.service"
)

SETUP = f"""
set -eu
root=$1
rm -f "$root/etc/hostname" "$root/etc/resolv.conf" "$root"/etc/ssh/ssh_host_*
rm -f "$root/var/lib/dbus/machine-id" "$root"/etc/apt/apt.conf.d/99mmdebstrap
: > "$root/etc/machine-id"
for unit in {MASKED}; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
for user in {" ".join(USERS[1:])}; do chroot "$root" useradd -m -s /bin/bash "$user"; done
for user in asked limited; do echo "$user:{PASSWORD}"; done | chroot "$root" chpasswd
echo 'deploy ALL=(ALL) NOPASSWD: ALL' > "$root/etc/sudoers.d/deploy"
echo 'asked ALL=(ALL) ALL' > "$root/etc/sudoers.d/asked"
chmod 0440 "$root"/etc/sudoers.d/*
cat > "$root/etc/ssh/sshd_config.d/lab.conf" <<'END'
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
END
"""


def tree(say: Say) -> Path:
    """The unpacked root file system, made first if need be; `say` is told what takes long.

    Raises Error with the last lines of mmdebstrap when it cannot be made.
    """
    folder = cache()
    archive = folder / f"{_key()}.tar.zst"
    unpacked = folder / _key()
    with exclusive(folder / "lock"):
        if not unpacked.is_dir():
            if not archive.is_file():
                _build(archive, say)
            _unpack(archive, unpacked, say)
    return unpacked


def cache() -> Path:
    """Where archives and trees are kept; made on first use, for its owner alone."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "inferfleet" / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # the tree holds setuid programs
    return folder


def codename() -> str:
    """The suite of this machine, "bookworm" or "noble" say."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def _key() -> str:
    parts = [codename(), platform.machine(), SETUP, *PACKAGES, *OPTIONS]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(archive: Path, say: Say) -> None:
    say(f"building the hosts' root file system ({codename()}), once; about a minute")
    partial = archive.with_name(f"partial-{archive.name}")
    found = sources(Path("/etc/apt"))
    settings = [f"--aptopt={line}" for line in _apt_settings()]
    hook = f"--customize-hook={SETUP}"
    wanted = [*OPTIONS, f"--include={','.join(PACKAGES)}", *settings, hook, codename()]
    # Without a source of its own, "-", mmdebstrap falls back to the distribution's.
    command("mmdebstrap", *wanted, str(partial), *(["-"] if found else []), stdin=found)
    partial.rename(archive)


def _unpack(archive: Path, unpacked: Path, say: Say) -> None:
    say("unpacking the hosts' root file system")
    partial = unpacked.with_name(f"partial-{unpacked.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    devices = "--exclude=./dev/*"  # nspawn makes its own
    command("tar", "--zstd", "--numeric-owner", "-xpf", str(archive), "-C", str(partial), devices)
    partial.rename(unpacked)


def _apt_settings() -> list[str]:
    """What this machine tells apt about proxies, retries and dates, one setting a line."""
    dump = command("apt-config", "dump")
    wanted = re.compile(r'Acquire::(https?|Retries|Check-\w+)\b.* ".+";')
    return [line for line in dump.splitlines() if wanted.match(line)]


def sources(etc_apt: Path) -> str:
    """The machine's own package sources of its own suite, of third parties none.

    Both notations are read; what is returned holds one of them, since mmdebstrap takes only one.
    """
    suites = {codename() + pocket for pocket in ("", "-updates", "-security")}
    stanzas = [
        stanza
        for path in sorted((etc_apt / "sources.list.d").glob("*.sources"))
        for stanza in re.split(r"\n\s*\n", _without_comments(path))
        if _stanza_fits(stanza, suites)
    ]
    if stanzas:
        return "\n\n".join(stanzas) + "\n"
    paths = [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*.list"))]
    lines = [line for path in paths if path.is_file() for line in path.read_text().splitlines()]
    return "".join(f"{line}\n" for line in lines if _line_fits(line, suites))


def _without_comments(path: Path) -> str:
    return "\n".join(x for x in path.read_text().splitlines() if not x.startswith("#"))


def _stanza_fits(stanza: str, suites: set[str]) -> bool:
    fields = dict(re.findall(r"^([\w-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
    return (
        "deb" in fields.get("Types", "").split()
        and "main" in fields.get("Components", "").split()
        and fields.get("Enabled", "yes") == "yes"
        and set(fields.get("Suites", "").split()) & suites != set()
    )


def _line_fits(line: str, suites: set[str]) -> bool:
    words = re.sub(r"\[.*?\]", "", line).split()
    return words[:1] == ["deb"] and len(words) > 3 and words[2] in suites
