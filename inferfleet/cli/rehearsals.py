"""Tasks for rehearsals: lab, demo."""

from __future__ import annotations

from invoke.context import Context

from inferfleet.cli.command import command


@command(
    hosts="how many hosts to boot (default: 3)",
    down="take the lab down",
    name="the lab's name, where there are several",
)
def lab(_: Context, hosts: str = "", down: bool = False, name: str = "lab") -> int:
    """Boot real hosts (systemd, sshd) on this machine to rehearse on, or take them down."""
    from inferfleet.advice import whole
    from inferfleet.lab import rehearsal

    return rehearsal.down(name) if down else rehearsal.up(name, whole("hosts", hosts, 3))


@command(keep="leave the hosts running afterwards")
def demo(_: Context, keep: bool = False) -> int:
    """Take a rehearsal from pilot to production on three hosts made for it."""
    from inferfleet.lab import demo as shown

    return shown.run(keep=keep)
