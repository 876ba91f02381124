"""Roles are folders: a project's own are found first, and an engine is added by copying one."""

import ast
import shutil

import make
import pytest

from inferfleet.errors import Error
from inferfleet.roles import Library, Role, shipped

OWN = """\
    hosts: {gpu-01: {address: 192.0.2.1, gpus: [{model: A}]}}
    models: {coder: {repository: org/coder}}
    deployments:
      chat: {engine: mine, model: coder, hosts: [gpu-01], port: 8000, options: {token_rate: 7}}
    phases: {p: {users: 1, why: w, hosts: [gpu-01], deployments: [chat]}}
"""


def test_a_copied_folder_is_an_engine(tmp_path):
    project = make.project(tmp_path, own=OWN)
    assert make.problems(project.folder) == [
        "own.yml:4:18: deployments.chat.engine: must be one of " + ", ".join(Library().engines())
    ]
    shutil.copytree(shipped("roles") / "simulator", tmp_path / "roles" / "mine")
    project = make.project(tmp_path, own=OWN)
    assert "mine" in project.library.engines()
    (bundle,) = project.bundles(project.plan("p"), project.plan("p").hosts)
    unit = next(a for a in bundle.artefacts if a.path.endswith("/inferfleet-chat-0.service"))
    assert b"--token-rate 7" in unit.content.replace(b" \\\n   ", b"")


def test_a_projects_own_role_replaces_the_shipped_one(tmp_path):
    shutil.copytree(shipped("roles") / "simulator", tmp_path / "roles" / "simulator")
    library = Library(tmp_path)
    assert library.role("simulator").folder == tmp_path / "roles" / "simulator"
    assert library.role("vllm").folder == shipped("roles") / "vllm"
    assert library.names() == Library().names()


def test_a_projects_own_skeleton_replaces_the_shipped_one(tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "engine.env.j2").write_text("# ours\n")
    shutil.copytree(shipped("roles") / "simulator", tmp_path / "roles" / "mine")
    project = make.project(tmp_path, own=OWN)
    (bundle,) = project.bundles(project.plan("p"), project.plan("p").hosts)
    (environment,) = [a for a in bundle.artefacts if a.path.endswith("engine.env")]
    assert environment.content == b"# ours\n"


@pytest.mark.parametrize("place", ["templates", "roles/simulator/templates"])
def test_a_projects_own_template_replaces_one_of_a_shipped_role(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "simulator.service.j2").write_text("# ours\n")
    text = OWN.replace("engine: mine", "engine: simulator")
    project = make.project(tmp_path, own=text)
    (bundle,) = project.bundles(project.plan("p"), project.plan("p").hosts)
    (unit,) = [a for a in bundle.artefacts if a.path.endswith("-chat-0.service")]
    assert unit.content == b"# ours\n"


def test_an_unknown_role_is_a_key_error():
    with pytest.raises(KeyError):
        Library().role("quux")


@pytest.mark.parametrize("text", [None, "a: [", "- a", "\0"])
def test_a_schema_that_cannot_be_read_names_its_file(tmp_path, text):
    if text is not None:
        (tmp_path / "schema.yml").write_text(text)
    with pytest.raises(Error, match=r"schema\.yml(:\d+:\d+)?: "):
        _ = Role("x", tmp_path).schema


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "schema.yml: cannot be read: no such file or directory; a role says its options"),
        ("type: object\na: [", "schema.yml:3:1: is not YAML: did not find expected node content"),
        ("a: \x07", "schema.yml: is not YAML: unacceptable character"),
        ("a: 1", "schema.yml: must be the schema of an object: `type: object`, `properties`"),
        ("type: objct", "schema.yml: is no JSON Schema: type: 'objct' is not valid under any"),
        (
            "type: object\nproperties: [a]",
            "schema.yml: is no JSON Schema: properties: ['a'] is not",
        ),
        ("properties: {a: 3}", "schema.yml: is no JSON Schema: properties.a: 3 is not of type"),
    ],
)
def test_a_projects_broken_schema_is_one_error_with_its_file(tmp_path, text, said):
    folder = tmp_path / "roles" / "simulator"
    shutil.copytree(shipped("roles") / "simulator", folder)
    (folder / "schema.yml").unlink()
    if text is not None:
        (folder / "schema.yml").write_text(text)
    project = make.project(tmp_path, own=OWN.replace("mine", "simulator"))
    with pytest.raises(Error) as caught:
        _ = project.inventory
    assert str(caught.value).startswith(f"{folder / said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", Library().names())
def test_a_role_is_complete_and_imports_no_stage(name):
    """Roles use the vocabulary and the pure builders, and nothing that acts."""
    folder = shipped("roles") / name
    assert (folder / "schema.yml").is_file()
    assert (folder / f"test_{name}.py").is_file()
    imported = set()
    for statement in ast.walk(ast.parse((folder / "role.py").read_text())):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("inferf"):
            inside = statement.module != "inferfleet"
            names = [statement.module.partition(".")[2]] if inside else []
            imported.update(names or (alias.name for alias in statement.names))
    pure = {"model", "builders", "errors", "facts.drivers", "flags", "metrics", "modelpath"}
    assert imported <= pure | {"gateways", "wheel"}


def test_every_shipped_role_has_its_own_name_and_kind():
    library = Library()
    assert set(library.engines()) >= {"ollama", "simulator", "vllm"}
    assert "balancer" in library.services()
