"""`inferfleet lab`: hosts to rehearse on by hand."""

from __future__ import annotations

from pathlib import Path

from inferfleet.errors import Error
from inferfleet.lab import (
    Lab,
    describe,
    fleet,
    install_requirements,
    requirements,
    take_down,
    wheels,
)


def up(name: str, count: int) -> int:
    """Boot `count` hosts and write a project for them to labs/<name>; prints how to go on."""
    install_requirements(print)
    if missing := requirements():
        raise Error("the lab cannot run here: " + "; ".join(missing))
    lab = Lab.boot(fleet.names(count), name=name)
    inventory = project(lab, fleet.place(name), wheels.folder(print))
    print(describe(lab))
    print(f"\ninferfleet provision --inventory {inventory} --phase pilot --rehearse")
    print(f"inferfleet lab --down{'' if name == 'lab' else f' --name {name}'}")
    return 0


def project(lab: Lab, folder: Path, wheels: Path | None = None) -> Path:
    """A project folder for the lab's hosts; its inventory's folder is returned.

    With a folder of `wheels`, it has gateways.
    """
    hosts = [
        fleet.Made(host.name, host.address, 22, "deploy", "sudo", host.fingerprints)
        for host in lab.hosts.values()
    ]
    return fleet.make(folder, hosts, lab.ssh_key, wheels)


def down(name: str) -> int:
    """Take the lab down, whatever is left of it."""
    print(f"{name}: taken down." if take_down(name) else f"{name}: no such lab is up.")
    return 0
