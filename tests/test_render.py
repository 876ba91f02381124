"""Rendering is pure and reproducible, masks secrets, and refuses what it cannot write safely.

The golden trees are what the example inventory renders to; REWRITE_GOLDEN=1 writes them anew, and
the diff is the review. What a role copies as it stands is named there instead of repeated.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import make
import pytest

from inferfleet import tree, wheel
from inferfleet.errors import RenderError
from inferfleet.project import Project
from inferfleet.secrets import Masked, Secrets

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
EXAMPLE = Project(ROOT / "inventory")
KEYS = ("ENGINE", "PILOT", "PLATFORM", "WEB")
VALUES = {f"INFERFLEET_{key}_KEY": f"sesame{key.lower()}a1b2c3d4" for key in KEYS}


def files(folder):
    """Relative path -> bytes of every file below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def rendered(project, phase, *, rehearse=False, secrets=None):
    plan = project.plan(phase, rehearse=rehearse)
    return project.bundles(plan, plan.hosts, secrets)


# golden trees


def write_for_review(folder, phase, rehearse):
    """A render, with what was copied from a role's folder named in the index, not repeated."""
    bundles = rendered(EXAMPLE, phase, rehearse=rehearse)
    tree.write(folder, bundles)
    sources = {path.read_bytes(): path for path in (ROOT / "roles").glob("*/*") if path.is_file()}
    sources[wheel.gateway()] = ROOT / "inferfleet/wheel.py"
    index = (folder / tree.INDEX).read_text()
    for bundle in bundles:
        for artefact in bundle.artefacts:
            if source := sources.get(artefact.content):
                (folder / bundle.host.name / artefact.path[1:]).unlink()
                index = index.replace(artefact.digest, f"that of {source.relative_to(ROOT)}")
    (folder / tree.INDEX).write_text(index)


@pytest.mark.parametrize("rehearse", [False, True], ids=["real", "rehearsal"])
@pytest.mark.parametrize("phase", EXAMPLE.inventory.phases)
def test_the_example_renders_to_its_golden_tree(tmp_path, phase, rehearse):
    golden = GOLDEN / ("rehearsal" if rehearse else "real") / phase
    write_for_review(tmp_path / "now", phase, rehearse)
    if os.environ.get("REWRITE_GOLDEN"):
        shutil.rmtree(golden, ignore_errors=True)
        shutil.copytree(tmp_path / "now", golden)
    wanted, got = files(golden), files(tmp_path / "now")
    assert list(got) == list(wanted)
    for path, content in got.items():
        assert content.decode() == wanted[path].decode(), path


# the tree


def test_two_processes_render_the_same_bytes(tmp_path):
    trees = []
    for seed in ("0", "1"):
        out = tmp_path / seed
        subprocess.run(
            [
                *(sys.executable, "-m", "inferfleet", "render", "--phase", "production"),
                *("--inventory", str(ROOT / "inventory"), "--output", str(out)),
            ],
            check=True,
            capture_output=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            timeout=60,
        )
        trees.append(files(out))
    assert trees[0] == trees[1]
    assert len(trees[0]) > 20


def test_the_index_tells_mode_owner_digest_and_what_restarts(tmp_path):
    index = tree.write(tmp_path / "out", rendered(EXAMPLE, "pilot"))
    assert json.loads((tmp_path / "out" / tree.INDEX).read_text())["hosts"] == index
    by_path = {entry["path"]: entry for entry in index["gpu-01"]["files"]}
    unit = "inferfleet-coder-pilot-0.service"
    content = (tmp_path / "out" / "gpu-01" / "etc/systemd/system" / unit).read_bytes()
    described = by_path[f"/etc/systemd/system/{unit}"]
    assert described["sha256"] == hashlib.sha256(content).hexdigest()
    assert described | {"sha256": ""} == {
        "path": f"/etc/systemd/system/{unit}",
        "mode": "0644",
        "owner": "root",
        "group": "root",
        "sha256": "",
        "secret": False,
        "restarts": [unit],
        "reloads": [],
    }
    keys = by_path["/etc/inferfleet/balancer/clients.conf"]
    assert (keys["mode"], keys["secret"], keys["sha256"]) == ("0600", True, None)
    assert keys["reloads"] == ["inferfleet-balancer.service"]


def test_what_an_earlier_render_left_is_removed(tmp_path):
    tree.write(tmp_path / "out", rendered(EXAMPLE, "production"))
    tree.write(tmp_path / "out", rendered(EXAMPLE, "local"))
    tree.write(tmp_path / "fresh", rendered(EXAMPLE, "local"))
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


@pytest.mark.parametrize("own", ["notes.txt", "index.json", "sub/index.json"])
def test_a_folder_that_no_render_made_is_left_alone(tmp_path, own):
    kept = tmp_path / "out" / own
    kept.parent.mkdir(parents=True)
    kept.write_text('{"made_by": "someone"}')
    with pytest.raises(Exception, match="no render made"):
        tree.write(tmp_path / "out", rendered(EXAMPLE, "local"))
    assert files(tmp_path / "out") == {own: b'{"made_by": "someone"}'}


def test_a_link_is_not_followed_to_be_emptied(tmp_path):
    tree.write(tmp_path / "real", rendered(EXAMPLE, "local"))
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(Exception, match="is not a folder"):
        tree.write(tmp_path / "out", rendered(EXAMPLE, "local"))


# secrets


def test_no_value_is_rendered_for_review_even_where_it_could_be_resolved(tmp_path, monkeypatch):
    for name, value in VALUES.items():
        monkeypatch.setenv(name, value)
    for phase in EXAMPLE.inventory.phases:
        for rehearse in (False, True):
            tree.write(tmp_path / "out", rendered(EXAMPLE, phase, rehearse=rehearse))
            text = b"".join(files(tmp_path / "out").values())
            assert not [value for value in VALUES.values() if value.encode() in text]


def test_masks_name_the_reference(tmp_path):
    tree.write(tmp_path / "out", rendered(EXAMPLE, "pilot"))
    found = files(tmp_path / "out" / "gpu-01" / "etc/inferfleet")
    assert b"<secret env:INFERFLEET_PILOT_KEY>" in found["balancer/clients.conf"]
    assert found["balancer/tls.key"] == b"<secret file:secrets/tls.key>"


def test_values_go_to_closed_files_alone_and_nothing_else_differs(tmp_path):
    shutil.copytree(ROOT / "inventory", tmp_path / "inventory")
    (tmp_path / "inventory" / "secrets").mkdir(exist_ok=True)
    for name in ("tls.crt", "tls.key"):
        (tmp_path / "inventory" / "secrets" / name).write_text(f"sesame {name}")
    project = Project(tmp_path / "inventory")
    secrets = Secrets(project.folder, environ=VALUES)
    for phase in project.inventory.phases:
        masked, revealed = rendered(project, phase), rendered(project, phase, secrets=secrets)
        for review, real in zip(masked, revealed, strict=True):
            assert review.ensures == real.ensures
            for shown, pushed in zip(review.artefacts, real.artefacts, strict=True):
                assert not (pushed.secret and pushed.mode & 0o037)
                assert not (pushed.secret and pushed.mode & 0o040 and pushed.group == "root")
                assert (shown.content == pushed.content) == (not pushed.secret)
                digests = pushed.path == "/etc/inferfleet/gateway/keys.json"
                assert (b"sesame" in pushed.content) == (pushed.secret and not digests)


# what roles may not do


@pytest.fixture
def render_with(tmp_path):
    """Render one host with a role made of the given generator body and templates."""

    def render(body, secrets=None, **templates):
        folder = tmp_path / "roles" / "mine"
        (folder / "templates").mkdir(parents=True)
        (folder / "schema.yml").write_text("type: object\nadditionalProperties: true\n")
        lines = "".join(f"    {line}\n" for line in body)
        (folder / "role.py").write_text(f"def artefacts(step, plan, render):\n{lines}")
        for name, text in templates.items():
            (folder / "templates" / f"{name}.j2").write_text(text)
        own = """\
            hosts: {web: {address: 192.0.2.1}}
            phases:
              p: {users: 1, why: w, hosts: [web], roles: {mine: {hosts: [web], key: !env KEY}}}
        """
        return rendered(make.project(tmp_path, own=own), "p", secrets=secrets)[0]

    return render


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("ok\n{{ missing | word }}\n", "one.j2:2: 'missing' is undefined"),
        ("ok\n{{ missing }}\n", "one.j2:2: 'missing' is undefined"),
        ("{% if missing %}x{% endif %}", "one.j2:1: 'missing' is undefined"),
        ("\n\n{% for x in host.nothing %}{% endfor %}", "one.j2:3: 'inferfleet.model.Host object'"),
        ("ok\n{{ value }}\n", "one.j2:2: str value printed without a quoting filter"),
        ("{{ value ~ 'x' }}", "one.j2:1: str value printed without a quoting filter"),
        ("{{ (value | word) ~ 'x' }}", "one.j2:1: str value printed without a quoting filter"),
        ("{{ true }}", "one.j2:1: bool value printed without a quoting filter"),
        ("\n{{ none }}", "one.j2:2: NoneType value printed without a quoting filter"),
        ("ok\n{{ odd | word }}", "one.j2:2: 'a b' is not a plain word"),
        ("ok\n{{ value | upper }}", "one.j2:2: No filter named 'upper'"),
        ("ok\n{% if %}", "one.j2:2: Expected an expression"),
        ("{% extends 'none.j2' %}", "web: mine: no template none.j2"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_named_with_host_and_line(
    render_with, template, said
):
    with pytest.raises(RenderError) as caught:
        render_with(
            ['yield render("/etc/x", "one.j2", value="word", odd="a b")'],
            one=template,
        )
    assert str(caught.value).startswith("web: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['yield render("etc/x", "one.j2")'], "a path must be absolute"),
        (['yield render("/etc/../x", "one.j2")'], "a path must be absolute"),
        (['yield render("/etc//x", "one.j2")'], "a path must be absolute"),
        (['yield render("/etc/x\\n", "one.j2")'], "a path must be absolute"),
        (['yield render("/etc/x", "one.j2")'] * 2, "/etc/x is written by mine and mine"),
        (
            ['yield render("/etc/x", "key.j2", key=step.settings["key"])'],
            "/etc/x: holds a secret and has mode 0644: use 0600",
        ),
        (
            ['yield render.copy("/etc/x", step.settings["key"], mode=0o640)'],
            "/etc/x: holds a secret and has mode 0640: use 0600",
        ),
        (
            ['yield render.copy("/etc/x", step.settings["key"], mode=0o660, group="web")'],
            "/etc/x: holds a secret and has mode 0660: use 0600",
        ),
    ],
)
def test_what_is_unsafe_to_write_is_refused(render_with, lines, said):
    with pytest.raises(RenderError, match=said):
        render_with(lines, one="x\n", key="{{ key | bearer }}\n")


def test_a_secret_is_masked_wherever_a_role_puts_it(render_with):
    """An f-string in a role, a title, a comparison in a template: all see the reference."""
    bundle = render_with(
        [
            "from inferfleet.model import Ensure",
            'key = step.settings["key"]',
            'yield Ensure(f"with {key}", test=f"[ {key} ]")',
            'yield render("/etc/x", "one.j2", text=f"{key}", key=key)',
        ],
        Secrets(Path(), environ={"KEY": "sesame"}),
        one="{{ text | nginx }}{% if key == 'sesame' %} seen{% endif %}\n",
    )
    assert bundle.ensures[0].title == "with <secret env:KEY>"
    assert bundle.artefacts[0].content == b'"<secret env:KEY>"'


def test_masked_secrets_read_nothing(render_with):
    bundle = render_with(
        ['yield render("/etc/x", "one.j2", mode=0o600, key=step.settings["key"])'],
        Masked(),
        one="{{ key | bearer }} {{ key | environment_file }} {{ key | nginx_bearer }}\n",
    )
    assert bundle.artefacts[0].secret
    mask = "<secret env:KEY>"
    assert bundle.artefacts[0].content.decode() == f'{mask} "{mask}" "~^(?i:Bearer) {mask}$"\n'
