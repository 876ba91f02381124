"""Roles are folders: role.py, schema.yml, templates/, test_<name>.py. Nothing is registered.

A project's own `roles/` and `templates/` are searched before those that come with the package,
so an engine is added, or one of ours replaced, by copying a folder.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml

from inferfleet.errors import Error
from inferfleet.model import Artefact, Ensure, Finding, Plan, Render, Step

FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
_PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path:
    """The folder `roles`, `templates` or `inventory` that comes with the package or the clone."""
    installed = _PACKAGE / "data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


@dataclass(frozen=True)
class Role:
    """One role folder, read on first use."""

    name: str
    folder: Path

    @cached_property
    def module(self) -> ModuleType:
        source = self.folder / "role.py"
        spec = importlib.util.spec_from_file_location(f"inferfleet_role_{self.name}", source)
        if spec is None or spec.loader is None:
            raise Error(f"{source}: cannot be loaded as Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    @cached_property
    def schema(self) -> Mapping[str, Any]:
        """The JSON Schema of the role's options: an object, every property described."""
        source = self.folder / "schema.yml"
        loaded = _read(source)
        if self.folder.parent != shipped("roles"):  # ours are checked by the tests
            _check_schema(source, loaded)
        return loaded

    @property
    def kind(self) -> Literal["engine", "service"]:
        """An engine serves the model of a deployment; a service is placed by a phase."""
        return "engine" if getattr(self.module, "KIND", "service") == "engine" else "service"

    @property
    def order(self) -> int:
        """Where it comes on a host: smaller first. Engines are 50."""
        return int(getattr(self.module, "ORDER", 50))

    @property
    def one_per_host(self) -> bool:
        """Whether one process of an engine serves all GPUs of a host."""
        return bool(getattr(self.module, "ONE_PER_HOST", False))

    @property
    def asks_engines(self) -> bool:
        """Whether it talks to the phase's engines, which then listen where it can reach them."""
        return bool(getattr(self.module, "ASKS_ENGINES", False))

    @property
    def rehearsable(self) -> bool:
        """Whether it can run where there is no GPU and no registry; if not, rehearsals skip it."""
        return bool(getattr(self.module, "REHEARSABLE", True))

    def artefacts(self, step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
        """What the role wants on the step's host."""
        yield from self.module.artefacts(step, plan, render)

    def check(self, step: Step, plan: Plan) -> Iterable[tuple[str, str]]:
        """Problems only the role can see: (option, what is wrong and what to do)."""
        found: Callable[[Step, Plan], Iterable[tuple[str, str]]] | None
        found = getattr(self.module, "check", None)
        return found(step, plan) if found else ()

    def preflight(self, step: Step, plan: Plan, facts: Any) -> Iterable[Finding]:
        """What the role finds wrong with a host before it is changed; see `inferfleet.facts`."""
        found: Callable[[Step, Plan, Any], Iterable[Finding]] | None
        found = getattr(self.module, "preflight", None)
        return found(step, plan, facts) if found else ()

    def warnings(self, step: Step, plan: Plan) -> Iterable[tuple[str, str]]:
        """What only the role can see and what works nevertheless: (option, what to know)."""
        found: Callable[[Step, Plan], Iterable[tuple[str, str]]] | None
        found = getattr(self.module, "warnings", None)
        return found(step, plan) if found else ()

    def ports(self, step: Step) -> tuple[int, ...]:
        """TCP ports the step listens on."""
        own: Callable[[Step], Iterable[int]] | None = getattr(self.module, "ports", None)
        return tuple(own(step)) if own else tuple(i.port for i in step.instances)


@dataclass(frozen=True)
class Library:
    """Where roles and template skeletons are looked up, first match wins."""

    project: Path | None = None
    _roles: dict[str, Role] = field(default_factory=dict)

    def _folders(self, name: str) -> list[Path]:
        own = [self.project / name] if self.project else []
        return [folder for folder in [*own, shipped(name)] if folder.is_dir()]

    def templates(self, role: Role) -> list[Path]:
        """Where a role's templates are looked up: the project's own of that name come first."""
        own = []
        if self.project:
            own = [self.project / "templates", self.project / "roles" / role.name / "templates"]
        every = [*own, role.folder / "templates", shipped("templates")]
        return [folder for folder in dict.fromkeys(every) if folder.is_dir()]

    def names(self) -> list[str]:
        """Every role there is, sorted."""
        found = {p.parent.name for f in self._folders("roles") for p in f.glob("*/role.py")}
        return sorted(found)

    def role(self, name: str) -> Role:
        """The role `name`; raises KeyError when there is none."""
        if name not in self._roles:
            for folder in self._folders("roles"):
                if (folder / name / "role.py").is_file():
                    self._roles[name] = Role(name, folder / name)
                    break
        return self._roles[name]

    def engines(self) -> list[str]:
        return [name for name in self.names() if self.role(name).kind == "engine"]

    def services(self) -> list[str]:
        return [name for name in self.names() if self.role(name).kind == "service"]


def _read(source: Path) -> Mapping[str, Any]:
    """A role's schema.yml. Raises Error naming the file, and the line where there is one."""
    try:
        loaded = yaml.load(source.read_text(encoding="utf-8"), FAST)  # noqa: S506 - is safe
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise Error(f"{source}: cannot be read: {why}; a role says its options there") from error
    except UnicodeDecodeError as error:
        raise Error(f"{source}: is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise Error(f"{source}{place}: is not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise Error(f"{source}: is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        raise Error(f"{source}: must be a JSON Schema object")
    return loaded


def _check_schema(source: Path, schema: Mapping[str, Any]) -> None:
    """Raises Error where it is no JSON Schema of an object."""
    import jsonschema  # here, because it costs more than all else at start

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = ".".join(map(str, error.absolute_path))
        said = f"{where}: {error.message}" if where else error.message
        raise Error(f"{source}: is no JSON Schema: {said}") from error
    if schema.get("type") != "object":
        raise Error(f"{source}: must be the schema of an object: `type: object`, `properties`")
