"""The reference is what the schemas and tasks say, and every key and option says something."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import msgspec
import pytest

from inferfleet.gateway import config, keys
from inferfleet.gateway import metrics as metrics_of
from inferfleet.gateway.app import FRONTS
from inferfleet.gateway.log import Record
from inferfleet.gateway.metrics import Metrics
from inferfleet.gateway.tracing import Tracer
from inferfleet.roles import Library
from inferfleet.schema import published

ROOT = Path(__file__).parents[1]
GATEWAY = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    path = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_reference"] = module
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(reference: ModuleType) -> None:
    written = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert written == reference.text(), "run python docs/make_reference.py"


def test_nothing_is_undocumented(reference: ModuleType) -> None:
    for row in re.findall(r"^\| `.*$", reference.text(), re.MULTILINE):
        meaning = row.split("|")[2].strip(" .")
        assert meaning, f"no word on {row}"


def test_the_published_schema_is_up_to_date() -> None:
    written = (ROOT / "inventory" / "schema.json").read_text(encoding="utf-8")
    assert written == published(Library(ROOT)), "run invoke schema"


# docs/gateway.md


def tables(page: str) -> dict[str, dict[str, str]]:
    """Heading -> first cells of the rows below it, each with the second."""
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"^#+ ", page, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| (`.*?) \| ?(.*?) ?\|", part, re.MULTILINE)
        cells = [(name, rest) for first, rest in rows for name in re.findall(r"`(.+?)`", first)]
        found[part.partition("\n")[0]] = dict(cells)
    return found


STRUCTS = {
    "The file": config.Config,
    "A pool": config.Pool,
    "An instance": config.Instance,
    "A model": config.Model,
    "A shadow": config.Shadow,
    "queue": config.Queue,
    "timeouts": config.Timeouts,
    "health": config.Health,
    "A key": keys._Entry,
}


@pytest.mark.parametrize("heading", STRUCTS)
def test_every_key_of_the_gateway_is_documented_with_its_default(heading: str) -> None:
    written = tables(GATEWAY)[heading]
    fields = msgspec.structs.fields(STRUCTS[heading])
    assert set(written) == {field.name for field in fields}
    for field in fields:
        if field.name in ("queue", "timeouts", "health"):
            continue
        default = (
            field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        )
        said = "" if default is msgspec.NODEFAULT else f"`{json.dumps(default)}`"
        assert written[field.name] == said, field.name


def test_the_gateways_example_is_one_and_its_keys_too(tmp_path: Path) -> None:
    example, entries = re.findall(r"^```json\n(.*?)^```", GATEWAY, re.MULTILINE | re.DOTALL)
    path = tmp_path / "gateway.json"
    path.write_text(example, encoding="utf-8")
    assert config.load(path).models["qwen2.5-coder"].tools
    path.write_text(entries, encoding="utf-8")
    path.chmod(0o640)
    assert keys.Keys(path)


def test_every_metric_and_field_of_the_gateway_is_documented() -> None:
    made = tables(GATEWAY)
    metrics = {
        metric.name.removeprefix("inferfleet_gateway_")
        + ("_total" if metric.type == "counter" else "")
        for metric in Metrics([]).collect()
    }
    assert set(made["Metrics"]) == metrics
    assert set(made["Request log"]) >= set(Record.__struct_fields__)
    for reason in (*get_args(metrics_of.Refused), *get_args(metrics_of.Ejected)):
        assert f"`{reason}`" in GATEWAY
    for parameter in inspect.signature(Tracer).parameters:
        assert parameter == "exporter" or f"`{parameter}`" in GATEWAY


def test_every_path_of_the_gateway_is_documented() -> None:
    shortened = GATEWAY.replace("…/count_tokens", "/v1/messages/count_tokens")
    for path in FRONTS:
        assert f"`{path}`" in shortened, path
