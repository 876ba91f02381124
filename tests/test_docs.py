"""The reference is what the schemas and tasks say, and every key and option says something."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from inferfleet.roles import Library
from inferfleet.schema import published

ROOT = Path(__file__).parents[1]


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
