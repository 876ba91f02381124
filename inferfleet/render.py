"""From a plan to bundles: pure, and byte for byte the same every time.

A `Renderer` is given either masks (for review) or resolved secrets (for pushing); nothing else
differs, so what was reviewed is what is pushed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jinja2

from inferfleet import quoting
from inferfleet.errors import RenderError
from inferfleet.model import Artefact, Bundle, Ensure, Host, Plan, Secret, Step
from inferfleet.roles import Library, Role

_PATH = re.compile(r"(/[^/\x00-\x1f\x7f]+)+")


class Reveal(Protocol):
    """Where a secret's value comes from: `secrets.Secrets` or `secrets.Masked`."""

    def resolve(self, secret: Secret) -> str: ...

    def bytes_of(self, secret: Secret) -> bytes: ...


@dataclass
class Renderer:
    """Renders role templates; one Jinja environment per role, whatever the number of hosts."""

    library: Library
    secrets: Reveal
    _environments: dict[str, jinja2.Environment] = field(default_factory=dict)
    _revealed: bool = False

    def reveal(self, value: object) -> object:
        """The value to write for `value`, noting that a secret went into the file."""
        if not isinstance(value, Secret):
            return value
        self._revealed = True
        shown = self.secrets.resolve(value)
        return quoting.Mask(shown) if shown == str(value) else shown

    def _filter(self, quote: Callable[..., Any]) -> Callable[..., Any]:
        def revealing(value: object, *arguments: Any) -> Any:
            return quote(self.reveal(value), *arguments)

        return revealing

    def environment(self, role: Role) -> jinja2.Environment:
        """The role's own Jinja environment: strict, and printing nothing unquoted."""
        if role.name not in self._environments:
            folders = self.library.templates(role)
            environment = jinja2.Environment(
                loader=jinja2.FileSystemLoader(folders),
                undefined=jinja2.StrictUndefined,
                finalize=_finalize,
                keep_trailing_newline=True,
                trim_blocks=True,
                lstrip_blocks=True,
                autoescape=False,  # noqa: S701 - every value must be Quoted, see _finalize
            )
            environment.filters = {k: self._filter(v) for k, v in quoting.FILTERS.items()}
            self._environments[role.name] = environment
        return self._environments[role.name]

    def text(self, role: Role, host: Host, template: str, values: Mapping[str, Any]) -> str:
        """One rendered template. Raises RenderError naming host, template and line."""
        try:
            return self.environment(role).get_template(template).render(values)
        except jinja2.TemplateNotFound as error:
            raise RenderError(f"{host.name}: {role.name}: no template {error.name}") from error
        except jinja2.TemplateSyntaxError as error:
            place = f"{error.filename or template}:{error.lineno}"
            raise RenderError(f"{host.name}: {place}: {error.message}") from error
        except (jinja2.UndefinedError, RenderError) as error:
            raise RenderError(f"{host.name}: {_place(error, template)}: {error}") from error

    def taint(self) -> bool:
        """Whether a secret was revealed since the last call."""
        revealed, self._revealed = self._revealed, False
        return revealed

    def bundle(self, plan: Plan, host: Host) -> Bundle:
        """Everything `host` should have in this phase, in the roles' order."""
        steps = plan.steps.get(host.name, ())
        parts = tuple((step.role, tuple(self._part(step, plan))) for step in steps)
        bundle = Bundle(host, plan.phase.name, parts)
        _refuse_clashes(bundle)
        return bundle

    def _part(self, step: Step, plan: Plan) -> Iterator[Artefact | Ensure]:
        role = self.library.role(step.role)
        for wanted in role.artefacts(step, plan, RoleRender(self, role, step.host)):
            if isinstance(wanted, Artefact):
                _refuse_unsafe(wanted, step)
            yield wanted


@dataclass(frozen=True)
class RoleRender:
    """What a role's generator gets: files from templates, from its folder, from secrets."""

    renderer: Renderer
    role: Role
    host: Host

    def __call__(
        self,
        path: str,
        template: str,
        /,
        *,
        mode: int = 0o644,
        group: str = "root",
        validate: tuple[str, ...] = (),
        restarts: tuple[str, ...] = (),
        reloads: tuple[str, ...] = (),
        **values: Any,
    ) -> Artefact:
        self.renderer.taint()
        text = self.renderer.text(self.role, self.host, template, {"host": self.host, **values})
        secret = self.renderer.taint()
        return Artefact(
            path, text.encode(), mode, "root", group, secret, validate, restarts, reloads
        )

    def copy(
        self,
        path: str,
        source: str | Secret,
        /,
        *,
        mode: int = 0o644,
        group: str = "root",
        restarts: tuple[str, ...] = (),
        reloads: tuple[str, ...] = (),
    ) -> Artefact:
        secret = isinstance(source, Secret)
        if isinstance(source, Secret):
            content = self.renderer.secrets.bytes_of(source)
        else:
            content = (self.role.folder / source).read_bytes()
        return Artefact(path, content, mode, "root", group, secret, (), restarts, reloads)


def _finalize(value: object) -> object:
    if isinstance(value, quoting.Quoted) or type(value) is int:
        return value
    if isinstance(value, jinja2.Undefined):
        return str(value)  # StrictUndefined: raises with the variable's name
    raise RenderError(f"{type(value).__name__} value printed without a quoting filter")


def _place(error: BaseException, template: str) -> str:
    """`file:line` of the template line that raised, from Jinja's rewritten traceback."""
    place, traceback = template, error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_filename.endswith(".j2"):
            place = f"{code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def _refuse_unsafe(wanted: Artefact, step: Step) -> None:
    who = f"{step.host.name}: {step.role}: {wanted.path}"
    if not _PATH.fullmatch(wanted.path) or ".." in wanted.path.split("/"):
        raise RenderError(f"{who}: a path must be absolute, without .. or control characters")
    others = 0o077 if wanted.group == "root" else 0o037  # a group of its own may read
    if wanted.secret and wanted.mode & others:
        raise RenderError(f"{who}: holds a secret and has mode {wanted.mode:04o}: use 0600")


def _refuse_clashes(bundle: Bundle) -> None:
    seen: dict[str, str] = {}
    for role, part in bundle.parts:
        for wanted in part:
            if not isinstance(wanted, Artefact):
                continue
            if wanted.path in seen:
                both = f"{seen[wanted.path]} and {role}"
                raise RenderError(f"{bundle.host.name}: {wanted.path} is written by {both}")
            seen[wanted.path] = role
