"""The composed schema: valid itself, complete, published as it is, and defaults in one place."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from inferfleet import schema
from inferfleet.model import Secret
from inferfleet.roles import Library

ROOT = Path(__file__).parent.parent
COMPOSED = schema.composed(Library())


def properties(part, path=""):
    """Every property of a schema, with its path."""
    for name, inner in part.get("properties", {}).items():
        yield f"{path}.{name}", inner
        yield from properties(inner, f"{path}.{name}")
    for name, inner in part.get("$defs", {}).items():
        yield from properties(inner, name)
    if isinstance(items := part.get("items"), dict):
        yield from properties(items, f"{path}[]")


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(COMPOSED)


def test_the_published_schema_is_the_composed_one():
    published = json.loads((ROOT / "inventory" / "schema.json").read_text())
    assert published == COMPOSED, "run `inferfleet schema`"


@pytest.mark.parametrize("name", Library().names())
def test_every_option_of_a_role_is_described_and_its_default_fits(name):
    role = Library().role(name)
    assert role.schema["additionalProperties"] is False
    for path, option in properties(role.schema, name):
        assert option.get("description"), path
        if "default" in option:
            jsonschema.validate(option["default"], option)


def test_every_key_of_the_core_is_described():
    """A `$ref`'s own description counts; groups' keys are the hosts'."""
    core = yaml.safe_load((ROOT / "inferfleet" / "schema.yml").read_text())
    for path, inner in properties(core):
        if path.startswith("group."):
            continue
        reference = inner.get("$ref", "").rpartition("/")[2]
        described = inner.get("description") or core["$defs"].get(reference, {}).get("description")
        assert described, path


@pytest.mark.parametrize("file", sorted((ROOT / "inventory").rglob("*.yml")), ids=lambda p: p.name)
def test_editors_find_the_schema_from_every_example_file(file):
    header = file.read_text().splitlines()[0]
    reference = header.removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / reference).resolve() == ROOT / "inventory" / "schema.json"


def test_defaults_fill_in_what_is_left_out_and_no_more():
    wanted = {
        "properties": {
            "a": {"default": 1},
            "b": {"default": []},
            "c": {},
            "d": {"default": {}, "properties": {"e": {"default": 2}}},
        }
    }
    given = {"a": 5}
    filled = schema.with_defaults(wanted, given)
    assert filled == {"a": 5, "b": [], "d": {"e": 2}}
    assert given == {"a": 5}
    filled["b"].append(1)
    assert wanted["properties"]["b"]["default"] == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Secret("env", "NAME"), []),
        ("hunter2", ["a secret written in clear"]),
        (5, ["must be of type string, not 5"]),
    ],
)
def test_what_is_secret_must_be_a_reference(value, said):
    checker = schema.validator({"properties": {"key": {"type": "string", "writeOnly": True}}})
    found = [fault.message for fault in schema.faults(checker, {"key": value}, lambda _: "")]
    assert [message[: len(part)] for message, part in zip(found, said, strict=True)] == said
    assert not any("hunter2" in message for message in found)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("ollma", "must be one of ollama, vllm (did you mean ollama?)"),
        (False, "must be one of ollama, vllm, not false; YAML reads unquoted no as false"),
        (None, "must be one of ollama, vllm, not null; YAML reads unquoted no as false"),
        (5, "must be one of ollama, vllm, not 5; YAML reads unquoted no as false"),
        ([[]], "must be one of ollama, vllm, not a list; YAML reads unquoted no as false"),
    ],
)
def test_a_choice_of_words_is_told_whatever_was_written(value, said):
    checker = schema.validator({"properties": {"engine": {"enum": ["ollama", "vllm"]}}})
    misread = "YAML reads unquoted no as false"
    found = list(schema.faults(checker, {"engine": value}, lambda _: misread))
    assert [fault.message for fault in found] == [said]
