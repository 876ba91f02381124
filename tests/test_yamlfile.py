"""Every way a file can be wrong is a problem with a place; what is right loads fast and exact."""

import codecs
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet import yamlbuild, yamlfile, yamlparse
from inferfleet.errors import Problem
from inferfleet.model import Secret


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "hosts.yml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def document_of(path):
    return yamlfile.load(path, shown="hosts.yml")[0]


def load(path):
    document, problems = yamlfile.load(path, shown="hosts.yml")
    return document.data, problems


def only_problem(path):
    _, problems = load(path)
    assert len(problems) == 1, problems
    assert problems[0].file == "hosts.yml"
    return problems[0]


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", {}),
        ("# nothing yet\n", {}),
        ("---\n", {}),
        ("\ufeffa: 1\n", {"a": 1}),
        ("a: 1\r\nb: [x, 'y']\r\n", {"a": 1, "b": ["x", "y"]}),
        ("%YAML 1.2\n---\na: yes\n...\n", {"a": True}),
        ("day: 2024-01-01\n", {"day": "2024-01-01"}),
        ("ports: 22:22\nt: 1:30.5\n", {"ports": "22:22", "t": "1:30.5"}),
        ("a: =\nb: <<\nc: ~\nd:\n", {"a": "=", "b": "<<", "c": None, "d": None}),
        ("a: 0x1F\nb: 1_000\nc: 1.5\n", {"a": 31, "b": 1000, "c": 1.5}),
        (
            "a: 0\nb: '022'\nc: 0o22\nd: 00\ne: 08\nf: 0.5\n",
            {"a": 0, "b": "022", "c": "0o22", "d": 0, "e": "08", "f": 0.5},
        ),
        ("a: &x {k: 1}\nb: *x\n", {"a": {"k": 1}, "b": {"k": 1}}),
        ("d: &d {p: 1, q: 1}\na: {<<: *d, q: 2}\n", {"d": {"p": 1, "q": 1}, "a": {"p": 1, "q": 2}}),
        ("a: {<<: [{k: 1}, {k: 2, l: 2}]}\n", {"a": {"k": 1, "l": 2}}),
        ("a: |\n  x:\n  \tmake\n", {"a": "x:\n\tmake\n"}),
        ("a: !env HF_TOKEN\n", {"a": Secret("env", "HF_TOKEN")}),
        ("a: !file keys/pilot\n", {"a": Secret("file", "keys/pilot")}),
        ('a: !cmd "pass show llm/key"\n', {"a": Secret("cmd", "pass show llm/key")}),
    ],
)
def test_loads(written, text, data):
    assert load(written(text)) == (data, [])


def test_aliases_share_no_objects(written):
    data, _ = load(written("a: &x {k: [1]}\nb: *x\n"))
    data["a"]["k"].append(2)
    assert data["b"] == {"k": [1]}


TRAPS = [
    ("a: 1\nb: 2\na: 3\n", 3, 1, "a", "also at hosts.yml:1:1"),
    ("h:\n  a: {x: 1, x: 2}\n", 2, 13, "h.a.x", "duplicate key, also at hosts.yml:2:7"),
    ("h: &h\n  x: 1\n  x: 2\ng: *h\n", 3, 3, "h.x", "duplicate key"),
    ("a:\n\tb: 1\n", 2, 1, "", "a tab in the indentation"),
    ("a:\n  b: 1\n \tc: 2\n", 3, 2, "", "a tab in the indentation"),
    ("a: x\n\ty\nb: 1\n", 2, 1, "", "a tab in the indentation"),
    ("a:\n  - x\n   \t- y\n", 2, 5, "a[0]", "indented with a tab"),
    ("a: *nope\n", 1, 4, "", "undefined alias"),
    ("a: *.example.com\n", 1, 5, "", "quote text that begins with *"),
    ("a: &x [*x]\n", 1, 4, "", "no end"),
    ("a: &x\n  <<: *x\n", 1, 4, "", "no end"),
    ("a: 1\n---\nb: 2\n", 2, 1, "", "one document in a file"),
    ("no: 1\n", 1, 1, "no", 'as the boolean false; write it in quotes: "no"'),
    ("g:\n  0: a\n", 2, 3, "g.0", 'as the number 0; write it in quotes: "0"'),
    ("~: 1\n", 1, 1, "~", "as null"),
    ("a: {{ name }}\n", 1, 5, "a.?", "quote text that begins with {"),
    ("!env A: 1\n", 1, 1, "A", "without the tag !env"),
    ("a: .inf\n", 1, 4, "a", "out of range"),
    ("a: .NaN\n", 1, 4, "a", "out of range"),
    ("a: 1.0e+999\n", 1, 4, "a", "out of range"),
    ("a: [1, " + "9" * 40 + "]\n", 1, 8, "a[1]", "if it is text, quote it"),
    ("a: " + "9" * 100_000 + "\n", 1, 4, "a", "(100000 characters) is out of range"),
    ("a: 022\n", 1, 4, "a", "022 is 18 in YAML 1.1 (octal) and 22 in YAML 1.2: write 22 or 18"),
    ("a: [1, -0_17]\n", 1, 8, "a[1]", "-0_17 is -15 in YAML 1.1 (octal) and -17 in YAML 1.2"),
    ("a: 0x_\n", 1, 4, "a", "does not fit"),
    ("a: !!int ''\n", 1, 4, "a", "does not fit the tag !!int"),
    ("a: !en X\n", 1, 4, "a", "unknown tag !en; known are !env, !file, !cmd, !vault (did you"),
    ("a: !!python/object:os.system x\n", 1, 4, "a", "unknown tag !!python/object:os.system"),
    ("a: !!set {b, c}\n", 1, 4, "a", "unknown tag !!set"),
    ("a: !env [X]\n", 1, 4, "a", "!env takes one plain value"),
    ("a: !env 'my token'\n", 1, 4, "a", "name of one environment variable"),
    ("a: !file\n", 1, 4, "a", "!file takes a path"),
    ("a: !cmd\n", 1, 4, "a", "!cmd takes a command"),
    ("a: !cmd 'x \"y'\n", 1, 4, "a", "no closing quotation"),
    ("a: !vault plain\n", 1, 4, "a", "encrypt_string"),
    ("a: " + "[" * 5_000, 1, 102, "", "deeper than 100"),
    ("[" * 200_000, 1, 100, "", "deeper than 100"),
    ("- " * 5_000, 1, 199, "", "deeper than 100"),
    ("- a\n", 1, 1, "", "must be a mapping"),
    ("some words\n", 1, 1, "", "must be a mapping"),
    ("<<: 3\n", 1, 5, "<<", "only a mapping can be merged"),
    ("a: b: c\n", 1, 5, "", 'quote a value that contains ": "'),
    ("a: @x\n", 1, 4, "", "found character '@'"),
    ("a: 'x\n", 2, 1, "", "a quote is not closed"),
    ('a: "\\q"\n', 1, 5, "", "single quotes"),
    ('a: "x\\0"\n', 1, 4, "a", "U+0000"),
    ("a: x\x07\n", 1, 5, "", "control character U+0007"),
    ("a: 1\nb: \0\n", 2, 4, "", "control character U+0000"),
    ("a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> x\n", 2, 1, "", "merge conflict"),
    (b"a: 1\nb: caf\xe9\n", 2, 7, "", "byte 0xe9 at offset 11"),
    ("\ufeffa: x".encode() + b"\xff", 1, 5, "", "byte 0xff at offset 7"),
    ("a: ä".encode() + b"\xc3", 1, 5, "", "byte 0xc3 at offset 5"),
    ("a: 1\n".encode("utf-16"), 1, 1, "", "save it as UTF-8"),
    ("a: 1\n".encode("utf-16-le"), 1, 1, "", "save it as UTF-8"),
    (codecs.BOM_UTF32_BE + "a: 1\n".encode("utf-32-be"), 1, 1, "", "save it as UTF-8"),
]


@pytest.mark.parametrize(("text", "line", "column", "path", "part"), TRAPS, ids=range(len(TRAPS)))
def test_trap_is_one_problem_with_its_place(written, text, line, column, path, part):
    problem = only_problem(written(text))
    assert (problem.line, problem.column, problem.path) == (line, column, path)
    assert part in problem.message


def test_all_mistakes_of_a_file_are_told_at_once_and_the_rest_still_loads(written):
    data, problems = load(written("no: 1\na: !foo x\nb: .inf\nc: {d: 1, d: 2}\n"))
    assert [(p.line, p.path) for p in problems] == [(1, "no"), (2, "a"), (3, "b"), (4, "c.d")]
    assert data == {"no": 1, "a": "x", "b": ".inf", "c": {"d": 2}}


def lists_of_aliases(levels, width):
    lines = ["a0: &a0 [x]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]")
    return "\n".join(lines) + "\n"


def test_alias_bombs_are_refused_at_once(written):
    began = time.monotonic()
    assert (
        "aliases add more than 1,000,000 values"
        in only_problem(written(lists_of_aliases(levels=60, width=9))).message
    )
    assert (
        "aliases nest deeper"
        in only_problem(written(lists_of_aliases(levels=5_000, width=1))).message
    )
    assert time.monotonic() - began < 5


def test_merge_bomb_is_refused(written):
    lines = ["a0: &a0 {k: x}"]
    for i in range(1, 60):
        parts = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{parts}]}}")
    assert "aliases add" in only_problem(written("\n".join(lines) + "\n")).message


def test_harmless_aliases_are_read(written):
    text = "base: &base {cache: /srv, tags: [a, b]}\nhosts:\n"
    text += "".join(f"  h{i}: {{<<: *base, port: {i}}}\n" for i in range(2_000))
    data, problems = load(written(text))
    assert not problems
    assert data["hosts"]["h1999"] == {"cache": "/srv", "tags": ["a", "b"], "port": 1999}


def test_too_many_values(written, monkeypatch):
    monkeypatch.setattr(yamlparse, "MAX_VALUES", 50)
    problem = only_problem(written("a:\n" + "- x\n" * 60))
    assert "more than 50 values" in problem.message
    assert problem.line == 2


# What stands in place of a file


def test_too_large(tmp_path):
    path = tmp_path / "hosts.yml"
    with path.open("wb") as file:
        file.truncate(yamlparse.MAX_BYTES + 1)
    assert "larger than 32 MiB" in only_problem(path).message


def make_absent(path):
    pass


def make_folder(path):
    path.mkdir()


def make_fifo(path):
    os.mkfifo(path)


def make_link_loop(path):
    path.symlink_to(path)


def make_dangling(path):
    path.symlink_to("gone.yml")


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (make_absent, "no such file"),
        (make_folder, "is a folder"),
        (make_fifo, "not a regular file"),
        (make_link_loop, "symbolic links"),
        (make_dangling, "link to gone.yml, which does not exist"),
        (make_device, "not a regular file"),
    ],
)
def test_no_file_there(tmp_path, make, part):
    path = tmp_path / "hosts.yml"
    make(path)
    problem = only_problem(path)
    assert part in problem.message
    assert (problem.line, problem.column) == (0, 0)
    assert document_of(path).position(["a"]) == (0, 0)


@contextmanager
def unprivileged():
    """Makes root an ordinary user for a moment: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that every user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_no_right_to_read(open_folder):
    path = open_folder / "hosts.yml"
    path.touch(mode=0o200)
    with unprivileged():
        problem = only_problem(path)
    assert problem.message.startswith("cannot be read: permission denied; check its mode")


# Positions

TEXT = """\
base: &base
  port: 8000   # merged below
hosts:
  gpu-01:
    <<: *base
    address: "192.0.2.1"
    country: no
    mode: 022
    version: 1.10
    on: true
    empty:
    gpus: [0, 1]
    disks:
      - name: a
      - name: b
"""


@pytest.mark.parametrize(
    ("keys", "value", "key"),
    [
        (["hosts", "gpu-01", "address"], (6, 14), (6, 5)),
        (["hosts", "gpu-01", "gpus", 1], (12, 15), (12, 15)),
        (["hosts", "gpu-01", "disks", 1, "name"], (15, 15), (15, 9)),
        (["hosts", "gpu-01", "port"], (2, 9), (2, 3)),
        (["hosts", "gpu-01", "on"], (10, 9), (10, 5)),
        (["hosts", "gpu-01"], (5, 5), (4, 3)),
        (["hosts", "gpu-01", "missing"], (4, 3), (4, 3)),
        (["hosts", "gpu-01", "gpus", 7], (12, 5), (12, 5)),
        (["hosts", "gpu-01", "disks", 1, "size"], (15, 9), (15, 9)),
        (["hosts", "gone", "deeper"], (3, 1), (3, 1)),
        ([], (1, 1), (1, 1)),
    ],
)
def test_position(written, keys, value, key):
    path = written(TEXT)
    assert document_of(path).position(keys) == value
    assert document_of(path).position(keys, key=True) == key


def test_position_follows_a_changed_file(written):
    path = written("a: 1\n")
    assert document_of(path).position(["a"]) == (1, 4)
    path = written("# moved\na:   1\n")
    assert document_of(path).position(["a"]) == (2, 6)


def test_raw_is_the_text_as_written(written):
    path = written(TEXT)
    host = ["hosts", "gpu-01"]
    assert document_of(path).raw([*host, "country"]) == "no"
    assert document_of(path).raw([*host, "mode"]) == "022"
    assert document_of(path).raw([*host, "gpus"]) is None
    assert document_of(path).raw([*host, "missing"]) is None


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("country", 'YAML reads unquoted no as false; write "no" if text is meant'),
        ("mode", 'YAML reads unquoted 022 as 18; write "022" if text is meant'),
        ("version", 'YAML reads unquoted 1.10 as 1.1; write "1.10" if text is meant'),
        ("empty", "YAML reads an empty value as null"),
        ("on", ""),
        ("port", ""),
        ("address", ""),
        ("gpus", ""),
        ("missing", ""),
    ],
)
def test_misread(written, key, said):
    assert document_of(written(TEXT)).misread(["hosts", "gpu-01", key]) == said


def test_dotted():
    assert yamlfile.dotted(["hosts", "gpu-01", "gpus", 0, "model"]) == "hosts.gpu-01.gpus[0].model"
    assert yamlfile.dotted([]) == ""


def test_did_you_mean():
    assert yamlfile.did_you_mean("adress", ["address", "port"]) == " (did you mean address?)"
    assert yamlfile.did_you_mean("zzz", ["address", "port"]) == ""


# A folder of files


def names(folder):
    files, problems = yamlfile.inventory_files(folder)
    return [str(file.relative_to(folder)) for file in files], problems


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_files_of_a_folder(tmp_path):
    touch(tmp_path, "b.yml", "a.yaml", "phases/pilot.yml", "README.md", "b.yml~", ".b.yml.swp")
    touch(tmp_path, ".git/x.yml", ".hidden.yml", "secrets/key", "a.yml.bak")
    assert names(tmp_path) == (["a.yaml", "b.yml", "phases/pilot.yml"], [])


def test_linked_folders_are_followed_once(tmp_path):
    touch(tmp_path, "inventory/z/hosts.yml", "shared/models.yml")
    (tmp_path / "inventory/a").symlink_to("z")
    (tmp_path / "inventory/models").symlink_to("../shared")
    assert names(tmp_path / "inventory") == (["models/models.yml", "z/hosts.yml"], [])


def test_linked_folder_without_end(tmp_path):
    touch(tmp_path, "a/hosts.yml")
    (tmp_path / "a/up").symlink_to("..")
    files, problems = names(tmp_path)
    assert files == ["a/hosts.yml"]
    assert [p.file for p in problems] == [str(tmp_path / "a/up")]
    assert "a folder that holds it" in problems[0].message


@pytest.mark.parametrize("make", [make_absent, make_folder])
def test_nothing_there_names_the_remedy(tmp_path, make):
    make(tmp_path / "inventory")
    files, problems = yamlfile.inventory_files(tmp_path / "inventory")
    assert not files
    assert "inferfleet init" in problems[0].message


def test_a_file_in_place_of_the_folder(tmp_path):
    touch(tmp_path, "hosts.yml")
    _, problems = yamlfile.inventory_files(tmp_path / "hosts.yml")
    assert problems == [
        Problem(str(tmp_path / "hosts.yml"), 0, 0, "", "is a file; name its folder")
    ]


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_folder_without_right_to_read(open_folder, mode):
    touch(open_folder, "a.yml", "closed/deeper/b.yml")
    closed = open_folder / "closed"
    closed.chmod(mode)
    with unprivileged():
        files, problems = names(open_folder)
    closed.chmod(0o700)
    assert files == ["a.yml"]
    assert problems == [Problem(str(closed), 0, 0, "", "cannot be read: permission denied")]


# Anything at all

TOKENS = (
    "a b: - , [ ] { } ? & * ! | > ' # % @ ` --- ... << &x *x !env !cmd !vault !!int no ~ 1 .inf 0x_"
    ' " 1:1 \\0 \\ \x00 \x85 \u2028 \ufeff é %YAML <<<<<<< $ANSIBLE_VAULT;'
)
YAML_LIKE = st.lists(
    st.sampled_from([*TOKENS.split(" "), " ", "  ", "\n  ", "\n- ", "\t", "\r"]), max_size=30
).map("".join)


def check_any(content, path):
    path.write_bytes(content)
    document, problems = yamlfile.load(path, shown="hosts.yml")
    assert isinstance(document.data, dict)
    assert all(problem.message for problem in problems)
    for keys in ([key] for key in document.data):
        assert document.position(keys)[0] > 0
        document.raw(keys)
        document.misread(keys)


@settings(deadline=None, max_examples=300)
@given(content=st.binary(max_size=200))
def test_any_bytes_give_data_or_problems(content, tmp_path_factory):
    check_any(content, tmp_path_factory.getbasetemp() / "any.yml")


@settings(deadline=None, max_examples=600)
@given(text=YAML_LIKE)
def test_any_yaml_like_text_gives_data_or_problems(text, tmp_path_factory):
    check_any(text.encode(), tmp_path_factory.getbasetemp() / "like.yml")


def test_without_libyaml_the_answers_are_the_same(tmp_path):
    """A second interpreter without the C part reads the same traps: same places, same paths."""
    elsewhere = ("\\q", "   \t")  # found too, one character or line away
    traps = [t for t in TRAPS if isinstance(t[0], str) and not any(e in t[0] for e in elsewhere)]
    for number, trap in enumerate(traps):
        (tmp_path / f"{number:03}.yml").write_bytes(trap[0].encode())
    program = (
        "import sys; sys.modules['yaml._yaml'] = None\n"
        "from pathlib import Path; from inferfleet.yamlfile import load\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    _, [p] = load(path, shown='hosts.yml'); print(p.line, p.column, p.path)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    expected = [" ".join(map(str, (line, column, path))) for _, line, column, path, _ in traps]
    assert [line.rstrip() for line in done.stdout.splitlines()] == [e.rstrip() for e in expected]


# Speed


def test_ten_thousand_hosts_load_in_seconds(written):
    host = (
        "    address: 192.0.2.1\n    port: 22\n    user: deploy\n    become: sudo\n"
        "    groups: [gpu, rack-{0}, production]\n    gpus: {{count: 8, model: NVIDIA H100}}\n"
        "    ram_gib: 1024\n    disk_gib: 7000.5\n    variables:\n      cache: /srv/models\n"
    )
    text = "hosts:\n" + "".join(f"  gpu-{i}:\n" + host.format(i % 40) for i in range(10_000))
    path = written(text)
    began = time.process_time()
    data, problems = load(path)
    assert time.process_time() - began < 6  # about 1.2 s on an idle machine
    assert (len(data["hosts"]), problems) == (10_000, [])
    assert document_of(path).position(["hosts", "gpu-9999", "ram_gib"]) == (109_998, 14)


def test_secret_tags_are_those_of_the_vocabulary():
    kinds = Secret.__dataclass_fields__["kind"].type
    assert all(repr(tag.removeprefix("!")) in kinds.replace('"', "'") for tag in yamlbuild._SECRETS)
