"""Bundles as a folder; most of it is tested where the example is rendered, in test_render."""

import json

import pytest

from inferfleet import tree
from inferfleet.errors import Error
from inferfleet.model import Artefact, Bundle, Ensure, Host


def bundle(name, *parts):
    return Bundle(Host(name, "192.0.2.1"), "p", (("role", parts),))


def test_programs_are_executable_and_secrets_have_no_digest(tmp_path):
    parts = (
        Artefact("/opt/x", b"#!/bin/sh\n", mode=0o755, restarts=("a.service",)),
        Artefact("/etc/key", b"<secret env:KEY>", mode=0o600, secret=True),
        Ensure("ready", "true", timeout=5),
    )
    index = tree.write(tmp_path / "deep" / "out", [bundle("web", *parts)])
    out = tmp_path / "deep" / "out" / "web"
    assert (out / "opt/x").stat().st_mode & 0o777 == 0o755
    assert (out / "etc/key").stat().st_mode & 0o777 == 0o644  # a mask; what git keeps
    assert [(f["path"], f["sha256"] is None) for f in index["web"]["files"]] == [
        ("/opt/x", False),
        ("/etc/key", True),
    ]
    assert index["web"]["ensures"] == [
        {"title": "ready", "test": "true", "run": "", "timeout": 5, "before": False}
    ]


def test_a_host_without_files_is_in_the_index(tmp_path):
    tree.write(tmp_path / "out", [bundle("idle")])
    written = json.loads((tmp_path / "out" / "index.json").read_text())
    assert written["hosts"] == {"idle": {"files": [], "ensures": []}}


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    tree.write(tmp_path / "out", [bundle("web", Artefact("/x", b""))])
    assert (tmp_path / "out" / "web" / "x").is_file()


@pytest.mark.parametrize("index", ["[]", "{", "null", '"inferfleet render"'])
def test_an_odd_index_is_not_ours(tmp_path, index):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(Error, match="no render made"):
        tree.write(tmp_path, [bundle("web")])
    assert (tmp_path / "index.json").read_text() == index
