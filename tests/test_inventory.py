"""What people write in an inventory: read as it is meant, or every mistake with its place."""

import os
from pathlib import Path

import make
import pytest

from inferfleet.errors import InventoryError
from inferfleet.inventory import load, select
from inferfleet.model import Gpu, Secret
from inferfleet.project import Project
from inferfleet.roles import Library

ENGINES = ", ".join(Library().engines())
SERVICES = ", ".join(Library().services())
BASE = """\
    groups:
      gpus: {}
      edge: {}
    hosts:
      gpu-01: {address: 192.0.2.1, groups: [gpus], gpus: [{model: L40S, count: 2}]}
      gpu-02: {address: 192.0.2.2, groups: [gpus], gpus: [{model: L40S, count: 2}]}
      lb-01: {address: 192.0.2.3, groups: [edge]}
    models:
      coder: {repository: org/coder}
    deployments:
      chat: {engine: simulator, model: coder, hosts: [gpus], port: 8000}
"""


def found(folder, text):
    return make.problems(make.write(folder, base=BASE, own=text))


CASES = {
    "misspelled key": (
        "hosts: {web: {adress: 192.0.2.9}}",
        ["own.yml:1:15: hosts.web.adress: unknown key (did you mean address?)"],
    ),
    "unknown section": (
        "host: {}",
        ["own.yml:1:1: host: unknown key (did you mean hosts?)"],
    ),
    "misspelled group of a host": (
        "hosts: {web: {groups: [gpu]}}",
        ["own.yml:1:24: hosts.web.groups[0]: there is no group 'gpu' (did you mean gpus?)"],
    ),
    "unknown group of a host": (
        "hosts: {web: {groups: [quux]}}",
        ["own.yml:1:24: hosts.web.groups[0]: there is no group 'quux'"],
    ),
    "misspelled host of a deployment": (
        "deployments: {d: {engine: vllm, model: coder, port: 1, hosts: [gpu-1]}}",
        [
            "own.yml:1:64: deployments.d.hosts[0]: there is no host or group 'gpu-1'"
            " (did you mean gpu-01?)"
        ],
    ),
    "glob without a host": (
        "deployments: {d: {engine: vllm, model: coder, port: 1, hosts: ['cpu-*']}}",
        ["own.yml:1:64: deployments.d.hosts[0]: there is no host or group 'cpu-*'"],
    ),
    "misspelled model": (
        "deployments: {d: {engine: vllm, model: codr, port: 1, hosts: [gpus]}}",
        ["own.yml:1:40: deployments.d.model: there is no model 'codr' (did you mean coder?)"],
    ),
    "misspelled engine": (
        "deployments: {d: {engine: vlm, model: coder, port: 1, hosts: [gpus]}}",
        [f"own.yml:1:27: deployments.d.engine: must be one of {ENGINES} (did you mean vllm?)"],
    ),
    "misspelled option of an engine": (
        "deployments: {d: {engine: simulator, model: coder, port: 1, hosts: [gpus],\n"
        "  options: {token_rat: 5}}}",
        ["own.yml:2:13: deployments.d.options.token_rat: unknown key (did you mean token_rate?)"],
    ),
    "option that is near none": (
        "deployments: {d: {engine: simulator, model: coder, port: 1, hosts: [gpus],\n"
        "  options: {quux: 2}}}",
        [
            "own.yml:2:13: deployments.d.options.quux: unknown key; known here: "
            + ", ".join(Library().role("simulator").schema["properties"])
        ],
    ),
    "misspelled option in a host's variables": (
        "hosts: {web: {variables: {simulator: {token_rat: 5}}}}",
        [
            "own.yml:1:39: hosts.web.variables.simulator.token_rat: unknown key"
            " (did you mean token_rate?)"
        ],
    ),
    "misspelled role in a group's variables": (
        "groups: {g: {variables: {balancr: {port: 5}}}}",
        ["own.yml:1:26: groups.g.variables.balancr: unknown key (did you mean balancer?)"],
    ),
    "misspelled deployment of a phase": (
        "phases: {p: {users: 1, why: w, hosts: [gpus], deployments: [chatt]}}",
        [
            "own.yml:1:61: phases.p.deployments[0]: there is no deployment 'chatt'"
            " (did you mean chat?)"
        ],
    ),
    "misspelled role of a phase": (
        "phases: {p: {users: 1, why: w, hosts: [gpus], roles: {balancr: {hosts: [edge]}}}}",
        ["own.yml:1:55: phases.p.roles.balancr: unknown key (did you mean balancer?)"],
    ),
    "unknown role of a phase": (
        "phases: {p: {users: 1, why: w, hosts: [gpus], roles: {quux: {hosts: [edge]}}}}",
        [f"own.yml:1:55: phases.p.roles.quux: unknown key; known here: {SERVICES}"],
    ),
    "misspelled host of a phase and of its role": (
        "phases:\n  p:\n    users: 1\n    why: w\n    hosts: [gpu-03]\n"
        "    roles: {balancer: {hosts: [lb-1], api_keys: {a: !env A}}}",
        [
            "own.yml:5:13: phases.p.hosts[0]: there is no host or group 'gpu-03'"
            " (did you mean gpu-02?)",
            "own.yml:6:32: phases.p.roles.balancer.hosts[0]: there is no host or group 'lb-1'"
            " (did you mean lb-01?)",
        ],
    ),
    "what is missing": (
        "models: {m: {}}\ndeployments: {d: {engine: vllm}}\nphases: {p: {}}",
        [
            "own.yml:1:13: models.m: 'repository' is missing",
            "own.yml:2:18: deployments.d: 'hosts' is missing",
            "own.yml:2:18: deployments.d: 'model' is missing",
            "own.yml:2:18: deployments.d: 'port' is missing",
            "own.yml:3:13: phases.p: 'hosts' is missing",
            "own.yml:3:13: phases.p: 'users' is missing",
            "own.yml:3:13: phases.p: 'why' is missing",
        ],
    ),
    "a repository that engines would take for an option": (
        "models: {m: {repository: --trust-remote-code}}",
        [
            "own.yml:1:26: models.m.repository: '--trust-remote-code' does not fit: A Hugging Face"
            " repository, an Ollama tag, or an absolute path on the hosts. (pattern ^[^-])"
        ],
    ),
    "bad name": (
        "hosts: {GPU_1: {}}",
        [
            "own.yml:1:9: hosts.GPU_1: not a name: Lower-case letters, digits and dashes,"
            " at most 63 characters, as in host names."
        ],
    ),
    "numbers out of range": (
        "hosts: {web: {port: 70000, ram_gib: 0, gpus: [{model: '', count: 65}]}}",
        [
            "own.yml:1:21: hosts.web.port: must be at most 65535, not 70000",
            "own.yml:1:37: hosts.web.ram_gib: must be more than 0, not 0",
            "own.yml:1:55: hosts.web.gpus[0].model: must not be empty",
            "own.yml:1:66: hosts.web.gpus[0].count: must be at most 64, not 65",
        ],
    ),
    "a country YAML takes for false": (
        "hosts: {web: {user: no}}",
        [
            "own.yml:1:21: hosts.web.user: must be of type string, not false;"
            ' YAML reads unquoted no as false; write "no" if text is meant'
        ],
    ),
    "an octal port": (
        "hosts: {web: {port: '022'}}",
        ["own.yml:1:21: hosts.web.port: must be of type integer, not '022'"],
    ),
    "an address that holds a command": (
        "hosts: {web: {address: 192.0.2.9;reboot}}",
        [
            "own.yml:1:24: hosts.web.address: '192.0.2.9;reboot' does not fit: An IP address or a"
            " name that resolves, or an alias of your ssh_config."
            " (pattern ^[A-Za-z0-9_.:-]+(%[A-Za-z0-9]+)?$)"
        ],
    ),
    "a secret in clear where one belongs": (
        "deployments: {d: {engine: vllm, model: coder, port: 1, hosts: [gpus], api_key: hunter2}}",
        [
            "own.yml:1:80: deployments.d.api_key: a secret written in clear; refer to it:"
            " !env NAME, !file PATH, !cmd or !vault"
        ],
    ),
    "a secret in clear where none belongs": (
        "deployments: {d: {engine: vllm, model: coder, port: 1, hosts: [gpus],\n"
        "  options: {environment: {HF_TOKEN: hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567}}}}",
        [
            "own.yml:2:37: deployments.d.options.environment.HF_TOKEN: looks like a secret in"
            " clear; refer to it: !env, !file, !cmd, !vault"
        ],
    ),
    "a secret's reference where none belongs": (
        "models: {m: {repository: !env NAME}}",
        ["own.yml:1:26: models.m.repository: a secret's reference has no meaning here"],
    ),
    "defined twice, in two files": (
        "hosts: {lb-01: {}}",
        ["own.yml:1:9: hosts.lb-01: defined twice; first in base.yml:7"],
    ),
    "a group named as a host": (
        "groups: {lb-01: {}}",
        ["own.yml:1:10: groups.lb-01: is a host's name too: patterns would be ambiguous"],
    ),
    "duplicate key": (
        "hosts:\n  web: {}\n  web: {}",
        [
            "own.yml:3:3: hosts.web: duplicate key, also at own.yml:2:3; keep one:"
            " the last would win"
        ],
    ),
    "a tab": (
        "hosts:\n\tweb: {}",
        ["own.yml:2:1: a tab in the indentation; YAML takes spaces only"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_a_mistake_is_told_once_with_its_place(tmp_path, text, expected):
    told = [
        line.replace(f"first in {_shown(tmp_path)}/", "first in ") for line in found(tmp_path, text)
    ]
    told = [line.replace(f"at {_shown(tmp_path)}/", "at ") for line in told]
    assert told == expected


def _shown(folder):
    return os.path.relpath(folder / "inventory")


def test_all_mistakes_are_told_at_once(tmp_path):
    first = """\
        hosts:
          web: {adress: 192.0.2.9, groups: [gpu]}
          db: {user: no, port: 0}
        deployments:
          d: {engine: vlm, model: codr, port: 1, hosts: [gpu-1, lb-1], api_key: hunter2}
    """
    second = """\
        models: {m: {repositry: x}}
        phases:
          p:
            users: 0
            hosts: [gpus, webb]
            deployments: [d, e]
            roles: {balancr: {}}
    """
    told = make.problems(make.write(tmp_path, base=BASE, a=first, b=second))
    assert [line.partition(": ")[2].partition(": ")[0] for line in told] == [
        "hosts.web.adress",
        "hosts.web.groups[0]",
        "hosts.db.user",
        "hosts.db.port",
        "deployments.d.engine",
        "deployments.d.model",
        "deployments.d.hosts[0]",
        "deployments.d.hosts[1]",
        "deployments.d.api_key",
        "models.m",
        "models.m.repositry",
        "phases.p",
        "phases.p.users",
        "phases.p.hosts[1]",
        "phases.p.deployments[1]",
        "phases.p.roles.balancr",
    ]


def test_an_unreadable_file_does_not_make_its_names_unknown(tmp_path):
    inventory = make.write(tmp_path, base=BASE, own="models: {m: {repository: x}")
    (inventory / "base.yml").write_text("hosts: [\n")
    make.write(tmp_path, more="phases: {p: {users: 1, why: w, hosts: [gpu-01]}}")
    told = make.problems(inventory)
    assert sorted(line.partition(":")[0] for line in told) == ["base.yml", "own.yml"]


def test_the_example_is_fine():
    folder = Path(__file__).parent.parent / "inventory"
    assert list(Project(folder).inventory.phases) == ["local", "pilot", "production"]


def test_levels_group_then_host_and_all_holds_every_host(tmp_path):
    inventory = make.project(
        tmp_path,
        own="""\
            groups:
              all: {user: deploy, variables: {simulator: {token_rate: 1, max_model_len: 7}}}
              a: {port: 2222, variables: {simulator: {token_rate: 2}}}
              b: {port: 3333, key: b.pem}
            hosts:
              one: {groups: [a, b], gpus: [{model: A}, {model: B, count: 2}]}
              two: {groups: [b, a], user: root, variables: {simulator: {token_rate: 3}}}
              here: {connection: local}
        """,
    ).inventory
    one, two, here = inventory.hosts.values()
    assert (one.user, one.port, one.key, one.address) == ("deploy", 3333, "b.pem", "one")
    assert (two.user, two.port, two.key) == ("root", 2222, "b.pem")
    assert one.variables["simulator"] == {"token_rate": 2, "max_model_len": 7}
    assert two.variables["simulator"] == {"token_rate": 3, "max_model_len": 7}
    assert one.gpus == (Gpu(0, "A"), Gpu(1, "B"), Gpu(2, "B"))
    assert here.address == here.private_address == "127.0.0.1"
    assert inventory.groups == {
        "all": ("one", "two", "here"),
        "a": ("one", "two"),
        "b": ("one", "two"),
    }


def test_secrets_stay_references(tmp_path):
    project = make.project(
        tmp_path,
        base=BASE,
        own="deployments: {d: {engine: vllm, model: coder, port: 1, hosts: [gpus], "
        "api_key: !env K}}",
    )
    assert project.inventory.deployments["d"].api_key == Secret("env", "K")


@pytest.mark.parametrize(
    ("patterns", "hosts", "empty"),
    [
        (["b", "a"], ("b", "a"), []),
        (["g", "b"], ("b", "c"), []),
        (["a", "*"], ("a", "b", "c"), []),
        (["[bc]"], ("b", "c"), []),
        (["none"], (), []),
        (["x", "y*", "a"], ("a",), ["x", "y*"]),
        (["?1"], ("c",), []),
    ],
)
def test_select(patterns, hosts, empty):
    groups = {"g": ("b", "c"), "none": (), "g1": ("c",)}
    assert select(patterns, ["a", "b", "c"], groups) == (hosts, empty)


def test_folders_that_hold_no_inventory(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, said in (("none", "no such folder"), ("empty", r"holds no \*.yml")):
        with pytest.raises(InventoryError, match=said):
            load(tmp_path / name, Library())
