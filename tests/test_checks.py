"""What a schema cannot see: addresses, GPUs, ports, heads, places, and what roles object to."""

import make
import pytest

from inferfleet.plan import GpuClaim, claims

BASE = """\
    groups: {gpus: {}, edge: {}, spare: {}}
    hosts:
      gpu-01: {address: 192.0.2.1, groups: [gpus], gpus: [{model: L40S, count: 4}]}
      gpu-02: {address: 192.0.2.2, groups: [gpus], gpus: [{model: L40S, count: 2}]}
      lb-01: {address: 192.0.2.3, groups: [edge]}
      here: {connection: local}
    models:
      coder: {repository: org/coder, attention_heads: 28}
"""

CASES = {
    "two hosts, one address": (
        "hosts:\n  web: {address: 192.0.2.3}",
        [
            "own.yml:2:18: hosts.web.address: has the address of 'lb-01', 192.0.2.3:"
            " two hosts cannot share one"
        ],
    ),
    "one address, spelt twice": (
        "hosts:\n  a: {address: 2001:db8::1}\n  b: {address: '2001:DB8:0::1', port: 22}",
        [
            "own.yml:3:16: hosts.b.address: has the address of 'a', 2001:DB8:0::1:"
            " two hosts cannot share one"
        ],
    ),
    "one private address twice": (
        """\
        hosts:
          a: {address: 192.0.2.8, private_address: 192.0.2.80}
          b: {address: 192.0.2.9, private_address: 192.0.2.80}
        """,
        [
            "own.yml:3:44: hosts.b.private_address: has the private_address of 'a', 192.0.2.80:"
            " two hosts cannot share one"
        ],
    ),
    "an address that is every interface": (
        "hosts: {a: {address: 192.0.2.9, private_address: 0.0.0.0}, b: {address: '::'}}",
        [
            "own.yml:1:50: hosts.a.private_address: 0.0.0.0 stands for every interface;"
            " name one address of the host",
            "own.yml:1:73: hosts.b.address: :: stands for every interface;"
            " name one address of the host",
        ],
    ),
    "engines that listen on an alias": (
        """\
        hosts: {gpu-03: {address: alias, gpus: [{model: L40S}]}}
        deployments:
          d: {engine: simulator, model: coder, hosts: [gpu-03], port: 8000}
        phases:
          p:
            users: 1
            why: w
            hosts: [gpu-03, lb-01]
            deployments: [d]
            roles: {balancer: {hosts: [lb-01], port: 80, api_keys: {x: !env X}}}
        """,
        [
            "own.yml:1:9: hosts.gpu-03.private_address: engines listen on 'alias', which is no IP"
            " address: add private_address"
        ],
    ),
    "a service on the port of SSH": (
        """\
        deployments:
          d: {engine: simulator, model: coder, hosts: [gpu-01], port: 22}
        phases: {p: {users: 1, why: w, hosts: [gpu-01], deployments: [d]}}
        """,
        ["own.yml:2:63: deployments.d.port: port 22 of gpu-01 is taken by 'sshd' (phase p)"],
    ),
    "two hosts behind one address, on other ports": (
        "hosts: {a: {address: 192.0.2.9, port: 1}, b: {address: 192.0.2.9, port: 2}}",
        [],
    ),
    "tensor parallelism of the GPUs": (
        """\
        deployments:
          d: {engine: vllm, model: coder, hosts: [gpus], port: 1, gpus_per_instance: 3}
        """,
        [
            "own.yml:2:78: deployments.d.gpus_per_instance: 3-way tensor parallelism does not"
            " divide the 28 attention heads of coder; 1, 2, 4, 7, 14, 28 do"
        ],
    ),
    "tensor parallelism by itself": (
        """\
        deployments:
          d: {engine: vllm, model: coder, hosts: [gpus], port: 1, options: {tensor_parallel: 8}}
        """,
        [
            "own.yml:2:86: deployments.d.options.tensor_parallel: 8-way tensor parallelism does"
            " not divide the 28 attention heads of coder; 1, 2, 4, 7, 14, 28 do"
        ],
    ),
    "parallelism that does not make the GPUs": (
        """\
        deployments:
          d:
            engine: vllm
            model: coder
            hosts: [gpu-01]
            port: 8000
            gpus_per_instance: 2
            options: {tensor_parallel: 4}
        phases: {p: {users: 1, why: w, hosts: [gpu-01], deployments: [d]}}
        """,
        [
            "own.yml:8:32: deployments.d.options.tensor_parallel: tensor x pipeline x data"
            " parallelism is 4, but gpus_per_instance is 2"
        ],
    ),
    "more GPUs than a host has": (
        """\
        deployments:
          d: {engine: simulator, model: coder, hosts: [gpus], port: 1, gpus_per_instance: 4}
        phases: {p: {users: 1, why: w, hosts: [gpus], deployments: [d]}}
        """,
        [
            "own.yml:2:83: deployments.d.gpus_per_instance: instance 0 wants GPU 2 of gpu-02,"
            " which has 2 (phase p)"
        ],
    ),
    "GPUs of a host without any": (
        """\
        deployments:
          d: {engine: simulator, model: coder, hosts: [lb-01], port: 1}
        phases: {p: {users: 1, why: w, hosts: [edge], deployments: [d]}}
        """,
        [
            "own.yml:2:3: deployments.d.gpus_per_instance: instance 0 wants GPU 0 of lb-01,"
            " which has none (phase p)"
        ],
    ),
    "two deployments share out more than there is": (
        """\
        deployments:
          a: {engine: simulator, model: coder, hosts: [gpu-02], port: 1, gpus_per_instance: 2}
          b: {engine: simulator, model: coder, hosts: [gpu-02], port: 2}
        phases: {p: {users: 1, why: w, hosts: [gpus], deployments: [a, b]}}
        """,
        [
            "own.yml:3:3: deployments.b.gpus_per_instance: instance 0 wants GPU 2 of gpu-02,"
            " which has 2 (phase p)"
        ],
    ),
    "one GPU named twice": (
        """\
        deployments:
          a: {engine: simulator, model: coder, hosts: [gpu-01], port: 1, gpus: [1]}
          b: {engine: simulator, model: coder, hosts: [gpu-01], port: 2, gpus: [1]}
        phases: {p: {users: 1, why: w, hosts: [gpus], deployments: [a, b]}}
        """,
        [
            "own.yml:3:72: deployments.b.gpus: GPU 1 of gpu-01 is claimed by 'a' too (phase p)",
        ],
    ),
    "too few GPUs named": (
        """\
        deployments:
          a:
            engine: simulator
            model: coder
            hosts: [gpu-01]
            port: 1
            gpus: [0, 1, 2]
            gpus_per_instance: 2
            instances_per_host: 2
        phases: {p: {users: 1, why: w, hosts: [gpus], deployments: [a]}}
        """,
        [
            "own.yml:7:11: deployments.a.gpus: names 3 GPUs; 2 x 2 are needed (phase p)",
        ],
    ),
    "one GPU in two phases": (
        """\
        deployments:
          a: {engine: simulator, model: coder, hosts: [gpu-01], port: 1, gpus: [1]}
          b: {engine: simulator, model: coder, hosts: [gpu-01], port: 1, gpus: [1]}
        phases:
          p: {users: 1, why: w, hosts: [gpus], deployments: [a]}
          q: {users: 1, why: w, hosts: [gpus], deployments: [b]}
        """,
        [],
    ),
    "two services on one port": (
        """\
        deployments:
          a:
            engine: simulator
            model: coder
            hosts: [gpu-01]
            port: 8000
            instances_per_host: 2
            api_key: !env K
          b: {engine: simulator, model: coder, hosts: [gpu-01], port: 8001, api_key: !env K}
        phases:
          p:
            users: 1
            why: w
            hosts: [gpu-01]
            deployments: [a, b]
            roles:
              balancer: {hosts: [gpu-01], port: 8000, api_keys: {x: !env K}}
        """,
        [
            "own.yml:9:63: deployments.b.port: port 8001 of gpu-01 is taken by 'a' (phase p)",
            "own.yml:17:41: phases.p.roles.balancer.port: port 8000 of gpu-01 is taken by 'a'"
            " (phase p)",
        ],
    ),
    "a port past the last": (
        """\
        deployments:
          a:
            engine: simulator
            model: coder
            hosts: [gpu-01]
            port: 65535
            instances_per_host: 2
        phases: {p: {users: 1, why: w, hosts: [gpu-01], deployments: [a]}}
        """,
        ["own.yml:6:11: deployments.a.port: 65536 is past the last port, 65535"],
    ),
    "a balancer without backends": (
        """\
        phases:
          p:
            users: 1
            why: w
            hosts: [edge]
            roles: {balancer: {hosts: [edge], api_keys: {x: !env K}}}
        """,
        [
            "own.yml:6:31: phases.p.roles.balancer.hosts: a balancer without backends:"
            " no deployment of the phase runs anywhere"
        ],
    ),
    "a balancer of what the phase lacks": (
        """\
        deployments:
          chat: {engine: simulator, model: coder, hosts: [gpu-01], port: 8000, api_key: !env K}
        phases:
          p:
            users: 1
            why: w
            hosts: [gpu-01, edge]
            deployments: [chat]
            roles: {balancer: {hosts: [edge], deployments: [chatt, chat], api_keys: {x: !env K}}}
        """,
        [
            "own.yml:9:52: phases.p.roles.balancer.deployments: 'chatt' is not a deployment of"
            " this phase; it has chat"
        ],
    ),
    "a phase without hosts": (
        "phases: {p: {users: 1, why: w, hosts: [spare]}}",
        ["own.yml:1:39: phases.p.hosts: names no host: no host is in these groups yet"],
    ),
    "a deployment that runs nowhere": (
        """\
        deployments:
          chat: {engine: simulator, model: coder, hosts: [gpus], port: 8000}
        phases: {p: {users: 1, why: w, hosts: [edge], deployments: [chat]}}
        """,
        [
            "own.yml:3:61: phases.p.deployments[0]: 'chat' runs on none of the phase's hosts;"
            " its own are gpu-01, gpu-02"
        ],
    ),
    "a role outside its phase": (
        """\
        deployments:
          chat: {engine: simulator, model: coder, hosts: [gpu-01], port: 8000, api_key: !env K}
        phases:
          p:
            users: 1
            why: w
            hosts: [gpu-01]
            deployments: [chat]
            roles: {balancer: {hosts: [edge, gpu-01], api_keys: {x: !env K}}}
        """,
        [
            "own.yml:9:31: phases.p.roles.balancer.hosts: lb-01: not among the phase's hosts;"
            " add them there"
        ],
    ),
    "this machine among others": (
        "phases: {p: {users: 1, why: w, hosts: [here, lb-01]}}",
        [
            "own.yml:1:39: phases.p.hosts: 'here' is this machine; other hosts cannot reach what"
            " listens on loopback"
        ],
    ),
    "an engine for others without a key": (
        """\
        deployments:
          chat: {engine: vllm, model: coder, hosts: [gpu-01], port: 8000}
        phases: {p: {users: 1, why: w, hosts: [gpu-01, lb-01], deployments: [chat],
          roles: {balancer: {hosts: [lb-01], api_keys: {x: !env K}}}}}
        """,
        [
            "own.yml:2:3: deployments.chat.api_key: listens for other hosts without a key:"
            " add `api_key: !env NAME`"
        ],
    ),
    "what Ollama cannot do": (
        """\
        deployments:
          chat:
            engine: ollama
            model: coder
            hosts: [gpu-01]
            port: 1
            instances_per_host: 2
            api_key: !env K
            extra_args: [--x]
        phases: {p: {users: 1, why: w, hosts: [gpu-01], deployments: [chat]}}
        """,
        [
            "own.yml:7:25: deployments.chat.instances_per_host: one Ollama serves all GPUs of a"
            " host: leave instances_per_host at 1",
            "own.yml:8:14: deployments.chat.api_key: Ollama checks no keys: put a balancer in"
            " front and give it the keys",
            "own.yml:9:17: deployments.chat.extra_args: `ollama serve` takes no arguments: use"
            " the engine's options",
        ],
    ),
    "an empty group is one problem": (
        """\
        deployments:
          a: {engine: simulator, model: coder, hosts: [spare], port: 8000}
          b: {engine: simulator, model: coder, hosts: [spare], port: 8100}
        phases:
          p:
            users: 1
            why: w
            hosts: [spare]
            deployments: [a, b]
            roles:
              balancer: {hosts: [spare], api_keys: {x: !env K}}
              base: {hosts: [spare]}
              monitoring: {hosts: [spare]}
        """,
        ["own.yml:8:12: phases.p.hosts: names no host: no host is in these groups yet"],
    ),
    "an empty group in a phase of others": (
        """\
        deployments:
          a: {engine: simulator, model: coder, hosts: [spare], port: 8000}
          b: {engine: simulator, model: coder, hosts: [spare], port: 8100}
          c: {engine: simulator, model: coder, hosts: [gpu-01], port: 8200}
        phases:
          p:
            users: 1
            why: w
            hosts: [edge, spare]
            deployments: [a, b, c]
            roles: {base: {hosts: [spare]}, balancer: {hosts: [spare], api_keys: {x: !env K}}}
        """,
        [
            "own.yml:10:19: phases.p.deployments[0]: 'a' runs on none of the phase's hosts, nor"
            " does 'b'; its own are none",
            "own.yml:10:25: phases.p.deployments[2]: 'c' runs on none of the phase's hosts; its"
            " own are gpu-01",
            "own.yml:11:27: phases.p.roles.base.hosts: names no host of the phase, nor do those of"
            " balancer",
        ],
    ),
    "roles on hosts that the phase lacks": (
        "phases: {p: {users: 1, why: w, hosts: [gpu-01], roles: {base: {hosts: [edge]}}}}",
        [
            "own.yml:1:71: phases.p.roles.base.hosts: lb-01: not among the phase's hosts;"
            " add them there"
        ],
    ),
    "a name that is nowhere, in many places": (
        """\
        models: {}
        deployments:
          a: {engine: simulator, model: large, hosts: [gpu-01], port: 8000}
          b: {engine: simulator, model: large, hosts: [rack], port: 8100}
        phases:
          p:
            users: 1
            why: w
            hosts: [rack]
            deployments: [a, b]
            roles: {base: {hosts: [rack]}, balancer: {hosts: [rack], api_keys: {x: !env K}},
                    monitoring: {hosts: [rack]}}
        """,
        [
            "own.yml:3:33: deployments.a.model: there is no model 'large'; also at"
            " deployments.b.model",
            "own.yml:4:48: deployments.b.hosts[0]: there is no host or group 'rack'; also at"
            " phases.p.hosts[0], phases.p.roles.base.hosts[0], phases.p.roles.balancer.hosts[0],"
            " 1 more",
        ],
    ),
    "a name that is misspelled in many places": (
        """\
        deployments:
          a: {engine: simulator, model: codr, hosts: [gpu-01], port: 8000}
          b: {engine: simulator, model: codr, hosts: [gpu-01], port: 8100}
        """,
        [
            "own.yml:2:33: deployments.a.model: there is no model 'codr' (did you mean coder?)",
            "own.yml:3:33: deployments.b.model: there is no model 'codr' (did you mean coder?)",
        ],
    ),
    "an octal port, told once": (
        """\
        deployments:
          a: {engine: simulator, model: coder, hosts: [gpu-01], port: 010000}
          b: {engine: simulator, model: coder, hosts: [gpu-01], port: 0200000}
        phases: {p: {users: 1, why: w, hosts: [gpu-01], deployments: [a, b]}}
        """,
        [
            "own.yml:2:63: deployments.a.port: 010000 is 4096 in YAML 1.1 (octal) and 10000 in YAML"
            ' 1.2: write 10000 or 4096 as meant, or "010000" if it is text',
            "own.yml:3:63: deployments.b.port: 0200000 is 65536 in YAML 1.1 (octal) and 200000 in"
            ' YAML 1.2: write 200000 or 65536 as meant, or "0200000" if it is text',
        ],
    ),
    "a typo is not followed by what it causes": (
        """\
        deployments:
          chat: {engine: simulator, model: coder, hosts: [gpu-01], port: 8000}
        phases: {p: {users: 1, why: w, hosts: [gpu-1], deployments: [chat]}}
        """,
        [
            "own.yml:3:40: phases.p.hosts[0]: there is no host or group 'gpu-1'"
            " (did you mean gpu-01?)"
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_a_mistake_is_told_once_with_its_place(tmp_path, text, expected):
    assert make.problems(make.write(tmp_path, base=BASE, own=text)) == expected


def test_claims_take_named_gpus_first_and_then_the_next_free(tmp_path):
    inventory = make.project(
        tmp_path,
        base=BASE,
        own="""\
            deployments:
              a: {engine: simulator, model: coder, hosts: [gpus], port: 1, instances_per_host: 2}
              b: {engine: simulator, model: coder, hosts: [gpus], port: 2, gpus: [1]}
              c: {engine: simulator, model: coder, hosts: [gpus], port: 3, gpus_per_instance: 0}
        """,
    ).inventory
    assert list(claims(inventory.deployments.values())) == [
        GpuClaim("a", 0, (0,)),
        GpuClaim("a", 1, (2,)),
        GpuClaim("b", 0, (1,)),
        GpuClaim("c", 0, ()),
    ]
