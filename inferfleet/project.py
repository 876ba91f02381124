"""A project folder: its inventory, roles, secrets and known hosts, and what is chosen of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from inferfleet import inventory as inventories
from inferfleet import places
from inferfleet import plan as plans
from inferfleet.errors import SecretError, TransportError, UsageError
from inferfleet.model import Bundle, Host, Inventory, Phase, Plan
from inferfleet.render import Renderer, Reveal
from inferfleet.roles import Library
from inferfleet.secrets import Masked, Secrets, Tolerant
from inferfleet.transport import Options
from inferfleet.yamlbuild import did_you_mean


@dataclass(frozen=True)
class Project:
    """`folder` is the inventory's; roles and templates of one's own stand beside it."""

    folder: Path

    @cached_property
    def library(self) -> Library:
        return Library(self.folder.resolve().parent)

    @cached_property
    def inventory(self) -> Inventory:
        """The checked inventory. Raises InventoryError with everything that is wrong."""
        return inventories.load(self.folder, self.library)

    @cached_property
    def secrets(self) -> Secrets:
        return Secrets(self.folder)

    @property
    def known_hosts(self) -> Path:
        """Host keys that `inferfleet trust` recorded; made to be committed."""
        return self.folder / "known_hosts"

    def phase(self, name: str | None) -> Phase:
        """The phase called `name`. Raises UsageError when there is none."""
        phases = self.inventory.phases
        known = f"the inventory's phases are {', '.join(phases) or 'none'}"
        if not name:
            raise UsageError(f"which phase? Say --phase NAME; {known}")
        if name not in phases:
            raise UsageError(f"there is no phase '{name}'{did_you_mean(name, phases)}; {known}")
        return phases[name]

    def host(self, name: str) -> Host:
        """The host called `name`. Raises UsageError when there is none."""
        hosts = self.inventory.hosts
        if name not in hosts:
            raise UsageError(f"there is no host '{name}'{did_you_mean(name, hosts)}")
        return hosts[name]

    def plan(self, name: str | None, *, rehearse: bool = False) -> Plan:
        return plans.build(self.inventory, self.phase(name), self.library, rehearse=rehearse)

    def chosen(self, plan: Plan, limit: str | None) -> tuple[Host, ...]:
        """The plan's hosts that `limit` leaves."""
        return self.limited(plan.hosts, limit)

    def limited(self, hosts: Iterable[Host], limit: str | None) -> tuple[Host, ...]:
        """Those of `hosts` that `limit` (hosts, groups, globs, commas) names; all without one."""
        if not limit:
            return tuple(hosts)
        patterns = [part.strip() for part in limit.split(",") if part.strip()]
        found, unknown = inventories.select(patterns, self.inventory.hosts, self.inventory.groups)
        left = tuple(host for host in hosts if host.name in found)
        if unknown:
            meant = did_you_mean(unknown[0], [*self.inventory.hosts, *self.inventory.groups])
            raise UsageError(f"--limit {limit}: there is no host or group '{unknown[0]}'{meant}")
        if not left:
            raise UsageError(f"--limit {limit}: none of the hosts here")
        return left

    @cached_property
    def _masking(self) -> Renderer:
        """One for all phases: templates are compiled once."""
        return Renderer(self.library, Masked())

    def bundles(
        self, plan: Plan, hosts: Sequence[Host], secrets: Reveal | None = None
    ) -> list[Bundle]:
        """What each host should have; secrets are masked unless they are given.

        Raises InventoryError when `secrets` cannot resolve some, with all of their places.
        """
        tolerant = Tolerant(secrets) if isinstance(secrets, Secrets) else None
        reveal = tolerant or secrets
        renderer = Renderer(self.library, reveal) if reveal else self._masking
        bundles = [renderer.bundle(plan, host) for host in hosts]
        if tolerant and tolerant.unresolved:
            raise places.unresolved(self.folder, plan.phase, tolerant.unresolved)
        return bundles

    def options(self) -> Options:
        """How to reach hosts: one's own SSH settings, and the host keys this project trusts."""
        return Options(
            known_hosts=(self.known_hosts, *Options().known_hosts),
            become_password=self._become_password,
        )

    def _become_password(self, host: Host) -> str | None:
        try:
            return self.secrets.resolve(host.become_password) if host.become_password else None
        except SecretError as error:  # this host's trouble, not its siblings'
            raise TransportError(host.name, str(error)) from error
