"""Names in an inventory that refer to nothing, whatever else may be wrong there. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from inferfleet.schema import Fault, Keys
from inferfleet.yamlbuild import did_you_mean, dotted

ALL = "all"  # the group every host is in
Entries = Mapping[str, Mapping[str, Any]]  # section -> name -> what was written


def unknown(entries: Entries) -> Iterator[Fault]:
    """Every reference to a host, group, model or deployment that is not there."""
    places = dict.fromkeys([*entries["hosts"], *entries["groups"], ALL])
    for reference in _references(entries):
        known = places if reference.what == "host or group" else entries[reference.what + "s"]
        if not _matches(reference, known):
            near = did_you_mean(reference.name, known)
            yield Fault(reference.keys, f"there is no {reference.what} '{reference.name}'{near}")


def folded(found: Iterable[Fault]) -> Iterator[Fault]:
    """What is not there at all, at the first place that names it, which counts the others.

    A misspelled name is told at every place, as each has to be corrected.
    """
    alike: dict[object, list[Fault]] = {}
    for fault in found:
        misspelled = "(did you mean" in fault.message
        alike.setdefault(fault.keys if misspelled else fault.message, []).append(fault)
    for first, *others in alike.values():
        places = [dotted(fault.keys) for fault in others[:3]]
        if len(others) > len(places):
            places.append(f"{len(others) - len(places)} more")
        also = f"; also at {', '.join(places)}" if places else ""
        yield replace(first, message=first.message + also)


def members(entries: Entries) -> dict[str, tuple[str, ...]]:
    """The hosts of every group, in inventory order."""
    found: dict[str, list[str]] = {group: [] for group in entries["groups"]}
    for name, host in _mappings(entries["hosts"]):
        for _, group in _strings(host, "groups"):
            if group in found:
                found[group].append(name)
    return {g: tuple(hosts) for g, hosts in found.items()} | {ALL: tuple(entries["hosts"])}


@dataclass(frozen=True, slots=True)
class _Reference:
    what: str  # "group", "model", "deployment", or "host or group", where globs are allowed
    name: str
    keys: Keys


def _matches(reference: _Reference, known: Iterable[str]) -> bool:
    if reference.name in known:
        return True
    return reference.what == "host or group" and bool(fnmatch.filter(known, reference.name))


def _references(entries: Entries) -> Iterator[_Reference]:
    for name, host in _mappings(entries["hosts"]):
        yield from _listed("group", host, "groups", ("hosts", name))
    for name, deployment in _mappings(entries["deployments"]):
        if isinstance(model := deployment.get("model"), str):
            yield _Reference("model", model, ("deployments", name, "model"))
        yield from _listed("host or group", deployment, "hosts", ("deployments", name))
    for name, phase in _mappings(entries["phases"]):
        yield from _listed("host or group", phase, "hosts", ("phases", name))
        yield from _listed("deployment", phase, "deployments", ("phases", name))
        for role, settings in _mappings(phase.get("roles")):
            here = ("phases", name, "roles", role)
            yield from _listed("host or group", settings, "hosts", here)


def _listed(what: str, entry: Mapping[str, Any], key: str, here: Keys) -> Iterator[_Reference]:
    for index, name in _strings(entry, key):
        yield _Reference(what, name, (*here, key, index))


def _strings(entry: Mapping[str, Any], key: str) -> Iterator[tuple[int, str]]:
    value = entry.get(key)
    for index, name in enumerate(value if isinstance(value, list) else ()):
        if isinstance(name, str):
            yield index, name


def _mappings(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, entry in value.items() if isinstance(value, dict) else ():
        if isinstance(entry, dict):
            yield name, entry
