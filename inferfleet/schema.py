"""The inventory's JSON Schema, composed from the core and every role's, and what it finds."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from inferfleet.model import Secret
from inferfleet.roles import FAST, Library
from inferfleet.yamlbuild import did_you_mean

Keys = tuple[str | int, ...]
_CORE = Path(__file__).with_name("schema.yml")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong at a place of a document; `at_key` means the key, not its value.

    A `warning` is shown and stops nothing.
    """

    keys: Keys
    message: str
    at_key: bool = False
    warning: bool = False


def composed(library: Library) -> dict[str, Any]:
    """The whole schema: the core, and the options of every role the library has."""
    schema: dict[str, Any] = yaml.load(_CORE.read_text("utf-8"), FAST)  # noqa: S506 - is safe
    definitions = schema["$defs"]
    engines, services = library.engines(), library.services()
    for name in [*engines, *services]:
        definitions[f"role-{name}"] = copy.deepcopy(dict(library.role(name).schema))
        definitions[f"variables-{name}"] = _without_required(library.role(name).schema)
    _compose_deployment(definitions["deployment"], engines)
    _compose_phase(definitions, services)
    variables = {name: {"$ref": f"#/$defs/variables-{name}"} for name in [*engines, *services]}
    definitions["variables"] |= {"properties": variables, "additionalProperties": False}
    return schema


def published(library: Library) -> str:
    """The composed schema as the JSON text that editors read."""
    return json.dumps(composed(library), indent=1) + "\n"


def _without_required(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {k: copy.deepcopy(v) for k, v in schema.items() if k != "required"}


def _compose_deployment(deployment: dict[str, Any], engines: Sequence[str]) -> None:
    deployment["properties"]["engine"]["enum"] = list(engines)
    deployment["allOf"] = [
        {
            "if": {"properties": {"engine": {"const": name}}, "required": ["engine"]},
            "then": {"properties": {"options": {"$ref": f"#/$defs/role-{name}"}}},
        }
        for name in engines
    ]


def _compose_phase(definitions: dict[str, Any], services: Sequence[str]) -> None:
    """A phase's role takes `hosts` beside the settings of the role's own schema."""
    roles = definitions["phase"]["properties"]["roles"]
    where = roles.pop("additionalProperties")
    roles["properties"] = {}
    for name in services:
        settings = copy.deepcopy(definitions[f"role-{name}"])
        settings.setdefault("properties", {}).update(copy.deepcopy(where["properties"]))
        settings["required"] = [*settings.get("required", []), "hosts"]
        roles["properties"][name] = settings
    roles["additionalProperties"] = False


def with_defaults(schema: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` and, for what it leaves out, the schema's defaults, nested objects included."""
    filled = dict(given)
    for key, wanted in schema.get("properties", {}).items():
        if key not in filled and "default" in wanted:
            filled[key] = copy.deepcopy(wanted["default"])
        if isinstance(filled.get(key), dict) and "properties" in wanted:
            filled[key] = with_defaults(wanted, filled[key])
    return filled


def validator(schema: Mapping[str, Any]) -> Any:
    """A validator of the schema that knows secrets by reference."""
    import jsonschema  # here, because it costs more than all else at start

    extend: Any = jsonschema.validators.extend
    return extend(jsonschema.Draft202012Validator, {"type": _type})(schema)


def _type(checker: Any, wanted: Any, instance: Any, schema: Mapping[str, Any]) -> Iterator[Any]:
    import jsonschema

    secret = bool(schema.get("writeOnly"))
    if isinstance(instance, Secret):
        if not secret:
            yield jsonschema.ValidationError("a secret's reference has no meaning here")
    elif secret and isinstance(instance, str):
        yield jsonschema.ValidationError(
            "a secret written in clear; refer to it: !env NAME, !file PATH, !cmd or !vault"
        )
    else:
        yield from jsonschema.Draft202012Validator.VALIDATORS["type"](
            checker, wanted, instance, schema
        )


def faults(checker: Any, data: object, misread: Callable[[Keys], str]) -> Iterator[Fault]:
    """Everything the schema finds wrong in one document, each as people would say it."""
    for error in checker.iter_errors(data):
        yield from _faults(error, misread)


def _faults(error: Any, misread: Callable[[Keys], str]) -> Iterator[Fault]:
    keys: Keys = tuple(error.absolute_path)
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for extra in [key for key in error.instance if key not in known]:
            yield Fault((*keys, extra), f"unknown key{_meant(extra, known)}", at_key=True)
    elif "propertyNames" in error.absolute_schema_path:
        yield Fault((*keys, error.instance), f"not a name: {error.schema['description']}", True)
    elif error.validator == "type":
        yield Fault(keys, _type_message(error, misread(keys)))
    elif error.validator == "enum":
        yield Fault(keys, _enum(error, misread(keys)))
    else:
        yield Fault(keys, _MESSAGES.get(error.validator, _as_it_is)(error))


def _meant(key: str, known: Mapping[str, Any]) -> str:
    """The nearest known key; all of them where none is near."""
    listed = f"; known here: {', '.join(known)}" if known else ""
    return did_you_mean(key, known) or listed


def _type_message(error: Any, misread: str) -> str:
    if isinstance(error.instance, Secret) or "secret" in error.message.split(" "):
        return str(error.message)
    wanted = error.validator_value
    names = wanted if isinstance(wanted, str) else " or ".join(wanted)
    said = f"must be of type {names}, not {_shown(error.instance)}"
    return f"{said}; {misread}" if misread else said


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as it is written in YAML
    return repr(value)


def _required(error: Any) -> str:
    missing = re.match(r"'([^']*)'", error.message)
    return f"'{missing[1]}' is missing" if missing else error.message


def _enum(error: Any, misread: str) -> str:
    known = [str(v) for v in error.validator_value]
    said = f"must be one of {', '.join(known)}"
    if isinstance(error.instance, str):
        return said + did_you_mean(error.instance, known)
    said += f", not {_shown(error.instance)}"
    return f"{said}; {misread}" if misread else said


def _pattern(error: Any) -> str:
    described = error.schema.get("description")
    return f"{error.instance!r} does not fit{': ' + described if described else ''} " + (
        f"(pattern {error.validator_value})"
    )


def _as_it_is(error: Any) -> str:
    return str(error.message)


_MESSAGES: dict[str, Callable[[Any], str]] = {
    "required": _required,
    "pattern": _pattern,
    "minimum": lambda e: f"must be at least {e.validator_value}, not {e.instance}",
    "maximum": lambda e: f"must be at most {e.validator_value}, not {e.instance}",
    "exclusiveMinimum": lambda e: f"must be more than {e.validator_value}, not {e.instance}",
    "minItems": lambda _: "must not be empty",
    "minLength": lambda _: "must not be empty",
    "not": lambda e: str(e.schema.get("description", e.message)),
    "uniqueItems": lambda _: "names something twice",
}
