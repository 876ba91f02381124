"""From YAML files to a checked `Inventory`, or to every problem there is, each with its place."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inferfleet import calibration, references, yamlfile
from inferfleet.checks import check
from inferfleet.errors import Error, InventoryError, Problem
from inferfleet.model import (
    Deployment,
    Gpu,
    Host,
    Inventory,
    Model,
    Phase,
    Placement,
    Secret,
)
from inferfleet.roles import Library
from inferfleet.schema import Fault, Keys, composed, faults, validator
from inferfleet.secrets import looks_like_secret
from inferfleet.yamlbuild import dotted

SECTIONS = ("hosts", "groups", "models", "deployments", "phases")


def load(folder: Path, library: Library) -> Inventory:
    """The inventory in `folder`. Raises InventoryError with all problems; touches no host."""
    reading = _read(folder)
    reading.validate(library)
    if not reading.unread:  # else half the names are missing and would be called unknown
        reading.refer()
    builder = _Builder(reading, folder, references.members(reading.entries))
    inventory = replace(builder.inventory(), calibration=reading.calibration(folder))
    if not reading.unread:
        reading.add(builder.faults)
        reading.add(check(inventory, library))
    if any(not problem.warning for problem in reading.problems):
        raise InventoryError(set(reading.problems))
    return replace(inventory, warnings=tuple(sorted(set(reading.problems))))


def select(
    patterns: Iterable[str], hosts: Iterable[str], groups: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], list[str]]:
    """Host names that patterns (hosts, groups, globs) stand for, and the patterns without any."""
    names = dict.fromkeys(hosts)
    found: dict[str, None] = {}
    empty = []
    for pattern in patterns:
        matched = list(_matches(pattern, names, groups))
        found.update(dict.fromkeys(matched))
        if not matched and pattern not in groups:
            empty.append(pattern)
    return tuple(found), empty


def _matches(
    pattern: str, hosts: Mapping[str, None], groups: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    if pattern in hosts:
        yield pattern
    elif pattern in groups:
        yield from groups[pattern]
    elif any(sign in pattern for sign in "*?["):
        yield from fnmatch.filter(hosts, pattern)
        for group in fnmatch.filter(groups, pattern):
            yield from groups[group]


@dataclass
class _Reading:
    """All files of a folder: entries by section and name, where each stands, what is wrong."""

    documents: list[yamlfile.Document]
    problems: list[Problem]
    unread: bool = False
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    where: dict[tuple[str, str], yamlfile.Document] = field(default_factory=dict)
    bad: set[Keys] = field(default_factory=set)

    def merge(self) -> None:
        """Bring the files' sections together; a name may be defined once only."""
        self.entries = {section: {} for section in SECTIONS}
        for document in self.documents:
            for section in SECTIONS:
                entries = document.data.get(section)
                for name, entry in entries.items() if isinstance(entries, dict) else ():
                    self._define(section, name, entry, document)

    def _define(self, section: str, name: str, entry: Any, document: yamlfile.Document) -> None:
        first = self.where.setdefault((section, name), document)
        if first is not document:
            line, _ = first.position((section, name), key=True)
            said = f"defined twice; first in {first.shown}:{line}"
            self._report(document, Fault((section, name), said, at_key=True))
        self.entries[section].setdefault(name, entry)

    def validate(self, library: Library) -> None:
        """Every document against the composed schema."""
        checker = validator(composed(library))
        for document in self.documents:
            found = list(faults(checker, document.data, document.misread))
            self.bad |= {fault.keys[:2] for fault in found}
            said = {fault.keys for fault in found}
            found += [fault for fault in _clear_secrets(document.data) if fault.keys not in said]
            told = self._told()
            for fault in found:
                if (document.shown, dotted(fault.keys)) not in told:
                    self._report(document, fault)

    def refer(self) -> None:
        """Every name that refers to nothing, once; what holds it is not judged further."""
        found = list(references.unknown(self.entries))
        self.bad |= {fault.keys[:2] for fault in found}
        self.add(references.folded(found))

    def calibration(self, folder: Path) -> Mapping[str, int]:
        """What verify recorded beside the inventory."""
        try:
            return calibration.load(folder)
        except Error as error:
            self.problems.append(Problem(str(folder / calibration.FILE), 0, 0, "", str(error)))
            return {}

    def good(self, section: str) -> dict[str, Any]:
        """The section's entries that the schema found nothing wrong with."""
        if (section,) in self.bad:
            return {}
        entries = self.entries[section].items()
        return {name: entry for name, entry in entries if (section, name) not in self.bad}

    def add(self, found: Iterable[Fault]) -> None:
        """What a later stage found, but for places where an earlier one found the cause."""
        told = self._told()
        for fault in found:
            document = self.where[str(fault.keys[0]), str(fault.keys[1])]
            if (document.shown, dotted(fault.keys)) not in told:
                self._report(document, fault)

    def _told(self) -> set[tuple[str, str]]:
        return {(each.file, each.path) for each in self.problems if not each.warning}

    def _report(self, document: yamlfile.Document, fault: Fault) -> None:
        line, column = document.position(fault.keys, key=fault.at_key)
        path = dotted(fault.keys)
        self.problems.append(
            Problem(document.shown, line, column, path, fault.message, fault.warning)
        )


def _read(folder: Path) -> _Reading:
    files, problems = yamlfile.inventory_files(folder)
    documents = []
    for file in files:
        shown = os.path.relpath(file)
        document, wrong = yamlfile.load(file, shown=shown)
        problems.extend(wrong)
        documents.append(document)
    reading = _Reading(documents, problems, unread=bool(problems))
    reading.merge()
    return reading


def _clear_secrets(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Strings that look like secrets, anywhere but in the hosts' own fixed keys."""
    for section in ("groups", "models", "deployments", "phases"):
        yield from _walk(data.get(section), (section,))
    hosts = data.get("hosts")
    for name, host in hosts.items() if isinstance(hosts, dict) else ():
        if isinstance(host, dict) and "variables" in host:
            yield from _walk(host["variables"], ("hosts", name, "variables"))


def _walk(value: object, keys: Keys) -> Iterator[Fault]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, (*keys, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, (*keys, index))
    elif isinstance(value, str):
        named = next((str(k) for k in reversed(keys) if isinstance(k, str)), "")
        if looks_like_secret(named, value):
            yield Fault(
                keys, "looks like a secret in clear; refer to it: !env, !file, !cmd, !vault"
            )


@dataclass
class _Builder:
    """Turns good entries into the nouns; `groups` name hosts that are not good, too."""

    reading: _Reading
    folder: Path
    groups: Mapping[str, tuple[str, ...]]
    faults: list[Fault] = field(default_factory=list)
    hosts: dict[str, Host] = field(default_factory=dict)

    def inventory(self) -> Inventory:
        self._hosts()
        models = {name: _model(name, m) for name, m in self.reading.good("models").items()}
        deployments = dict(self._deployments(models))
        phases = [self._phase(name, p) for name, p in self.reading.good("phases").items()]
        # a phase that lacks what was already found wrong is not judged further
        whole = {
            p.name: p
            for p in phases
            if set(p.deployments) <= set(deployments) and set(p.hosts) <= set(self.hosts)
        }
        return Inventory(str(self.folder), self.hosts, self.groups, models, deployments, whole)

    def _hosts(self) -> None:
        groups = self.reading.good("groups")
        for name, entry in self.reading.good("hosts").items():
            self.hosts[name] = _host(name, entry, groups)
        for group in self.groups:
            if group in self.reading.entries["hosts"]:
                said = "is a host's name too: patterns would be ambiguous"
                self.faults.append(Fault(("groups", group), said, at_key=True))

    def _deployments(self, models: Mapping[str, Model]) -> Iterator[tuple[str, Deployment]]:
        for name, entry in self.reading.good("deployments").items():
            if entry["model"] in models:
                hosts = self._select(entry["hosts"])
                yield name, _deployment(name, entry, models[entry["model"]], hosts)

    def _phase(self, name: str, entry: Mapping[str, Any]) -> Phase:
        hosts = self._select(entry["hosts"])
        placements = []
        for role, settings in entry.get("roles", {}).items():
            chosen = self._select(settings["hosts"])
            if outside := sorted(set(chosen) - set(hosts)):
                said = f"{', '.join(outside[:5])}: not among the phase's hosts; add them there"
                self.faults.append(Fault(("phases", name, "roles", role, "hosts"), said))
            own = {key: value for key, value in settings.items() if key != "hosts"}
            placements.append(Placement(role, tuple(h for h in chosen if h in hosts), own))
        named = tuple(entry.get("deployments", ()))
        return Phase(name, hosts, named, tuple(placements), entry["users"], entry["why"])

    def _select(self, patterns: Sequence[str]) -> tuple[str, ...]:
        return select(patterns, self.reading.entries["hosts"], self.groups)[0]


_SHARED = ("connection", "port", "user", "key", "become", "become_password")


def _host(name: str, entry: Mapping[str, Any], groups: Mapping[str, Any]) -> Host:
    """A host with what its groups say; the host wins, then the group it names last."""
    levels = [groups.get(g, {}) for g in (references.ALL, *entry.get("groups", ()))] + [entry]
    own = {key: level[key] for level in levels for key in _SHARED if key in level}
    variables: dict[str, dict[str, Any]] = {}
    for level in levels:
        for role, options in level.get("variables", {}).items():
            variables[role] = variables.get(role, {}) | options
    address = entry.get("address", "127.0.0.1" if own.get("connection") == "local" else name)
    return Host(
        name=name,
        address=address,
        private_address=entry.get("private_address", address),
        host_keys=tuple(entry.get("host_keys", ())),
        groups=tuple(entry.get("groups", ())),
        gpus=_gpus(entry.get("gpus", ())),
        ram_gib=entry.get("ram_gib"),
        disk_gib=entry.get("disk_gib"),
        variables=variables,
        **own,
    )


def _gpus(entries: Iterable[Mapping[str, Any]]) -> tuple[Gpu, ...]:
    whole = [entry for entry in entries for _ in range(entry.get("count", 1))]
    found: list[Gpu] = []
    for number, entry in enumerate(whole):
        model, island, profiles = entry["model"], entry.get("island", 0), entry.get("mig", ())
        for slot, mig in enumerate(profiles):
            found.append(Gpu(len(found), f"{model} MIG {mig}", island, mig, f"{number}:{slot}"))
        if not profiles:
            moved = str(number) if number != len(found) else ""
            found.append(Gpu(len(found), model, island, device=moved))
    return tuple(found)


def _model(name: str, entry: Mapping[str, Any]) -> Model:
    return Model(name=name, **{"served_name": name, **entry})


def _deployment(
    name: str, entry: Mapping[str, Any], model: Model, hosts: tuple[str, ...]
) -> Deployment:
    gpus, key = entry.get("gpus"), entry.get("api_key")
    return Deployment(
        name=name,
        engine=entry["engine"],
        model=model,
        hosts=hosts,
        port=entry["port"],
        gpus_per_instance=entry.get("gpus_per_instance", 1),
        instances_per_host=entry.get("instances_per_host", 1),
        instances=entry.get("instances"),
        gpus=None if gpus is None else tuple(gpus),
        api_key=key if isinstance(key, Secret) else None,
        options=entry.get("options", {}),
        extra_args=tuple(entry.get("extra_args", ())),
        if_too_large=entry.get("if_too_large", "refuse"),
    )
