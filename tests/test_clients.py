"""What clients are told of a phase: addresses, sizes, keys by name alone, and safe writing."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import make
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.abilities import LONGEST_ANSWER, abilities, share
from inferfleet.clients import CLIENTS, configuration, writing
from inferfleet.clients.access import Access, Configuration, Endpoint, Served
from inferfleet.clients.discovery import Wanted, access
from inferfleet.errors import Error, UsageError
from inferfleet.model import Deployment, Host, Instance, Model

ROOT = Path(__file__).parent.parent
MODELS = """
    models:
      coder:
        {repository: Qwen/Qwen2.5-Coder-7B-Instruct-AWQ, served_name: qwen2.5-coder,
         context_length: 32768, attention_heads: 28}
      tag: {repository: "qwen2.5-coder:7b", served_name: local-coder, context_length: 32768}
      embedder: {repository: BAAI/bge-m3, served_name: bge-m3, context_length: 8192}
"""
HOSTS = """
    hosts:
      here: {connection: local, gpus: [{model: L40S}]}
      gpu-01: {address: 192.0.2.11, gpus: [{model: L40S, count: 4}]}
      lb-01: {address: 192.0.2.21}
      lb-02: {address: 192.0.2.22}
"""
ENGINES = """
    deployments:
      local: {engine: ollama, model: tag, hosts: [here], port: 11434, OPTIONS}
      chat: {engine: vllm, model: coder, hosts: [gpu-01], port: 8000, api_key: !env ENGINE_KEY,
             options: {runtime: native, max_model_len: 16384, tool_call_parser: hermes}}
      plain: {engine: vllm, model: coder, hosts: [gpu-01], port: 8010, api_key: !env ENGINE_KEY,
              options: {runtime: native}}
      embed: {engine: vllm, model: embedder, hosts: [gpu-01], port: 8020, api_key: !env ENGINE_KEY,
              options: {runtime: native}}
"""
ONE = "{hosts: [lb-01], port: 8080, api_keys: {alice: !env ALICE_KEY}}"


def found(tmp_path, hosts, deployments, roles="", wanted=None, options="", rehearse=False):
    """The access of a phase of these deployments and roles."""
    phase = f"{{users: 1, why: w, hosts: [{hosts}], deployments: [{deployments}]"
    phase += f", roles: {{{roles}}}}}" if roles else "}"
    engines = ENGINES.replace("OPTIONS", f"options: {{{options or 'context_length: 8192'}}}")
    project = make.project(
        tmp_path, hosts=HOSTS, models=MODELS, engines=engines, phase=f"phases: {{p: {phase}}}\n"
    )
    return access(project.plan("p", rehearse=rehearse), project.library, wanted or Wanted())


def balanced(tmp_path, balancer=ONE, deployments="chat", wanted=None, **more):
    hosts = "gpu-01, lb-01, lb-02"
    return found(tmp_path, hosts, deployments, f"balancer: {balancer}", wanted, **more)


def only(found):
    """The one endpoint and its one model."""
    ((endpoint,), ((_, model),)) = found.endpoints, found.chats()
    return endpoint, model


# addresses

TLS = "tls: {certificate: !file tls.crt, key: !file tls.key}"


@pytest.mark.parametrize(
    ("balancer", "base"),
    [
        ("port: 8080", "http://192.0.2.21:8080/v1"),
        ("port: 80", "http://192.0.2.21/v1"),
        (f"port: 443, {TLS}", "https://192.0.2.21/v1"),
        (f"port: 8443, {TLS}", "https://192.0.2.21:8443/v1"),
        (f"port: 443, server_name: llm.example.com, {TLS}", "https://llm.example.com/v1"),
        ("port: 443, server_name: llm.example.com", "http://llm.example.com:443/v1"),
    ],
)
def test_a_balancers_address(tmp_path, balancer, base):
    settings = f"{{hosts: [lb-01], api_keys: {{alice: !env ALICE_KEY}}, {balancer}}}"
    endpoint, _ = only(balanced(tmp_path, settings))
    assert endpoint.base == base


def test_ipv6_stands_in_brackets(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "HOSTS", HOSTS.replace("192.0.2.21", '"2001:db8::21"'))
    assert only(balanced(tmp_path))[0].base == "http://[2001:db8::21]:8080/v1"
    default = f"{{hosts: [lb-01], port: 443, api_keys: {{a: !env A}}, {TLS}}}"
    assert only(balanced(tmp_path, default))[0].base == "https://[2001:db8::21]/v1"


def test_several_pools_have_a_path_each(tmp_path):
    got = balanced(tmp_path, deployments="chat, plain, embed")
    assert [(e.name, e.base) for e in got.endpoints] == [
        ("inferfleet-p-chat", "http://192.0.2.21:8080/chat/v1"),
        ("inferfleet-p-plain", "http://192.0.2.21:8080/plain/v1"),
        ("inferfleet-p-embed", "http://192.0.2.21:8080/embed/v1"),
    ]
    assert [m.tools for _, m in got.chats()] == [True, False]
    assert [m.name for _, m in got.embedders()] == ["bge-m3"]


def test_a_balancer_serves_what_it_is_told_to(tmp_path):
    settings = "{hosts: [lb-01], port: 80, api_keys: {a: !env A}, deployments: [plain]}"
    endpoint, model = only(balanced(tmp_path, settings, deployments="chat, plain"))
    assert (endpoint.base, model.tools) == ("http://192.0.2.21/v1", False)


def test_several_balancers_without_a_name_are_told(tmp_path):
    both = "{hosts: [lb-01, lb-02], port: 80, api_keys: {a: !env A}}"
    assert any("192.0.2.21, 192.0.2.22" in note for note in balanced(tmp_path, both).notes)
    named = both.replace("port", "server_name: llm.example.com, port")
    assert not any("192.0.2.22" in note for note in balanced(tmp_path, named).notes)


@pytest.mark.parametrize("url", ["https://llm.example.com", "https://llm.example.com/v1/"])
def test_another_address(tmp_path, url):
    one = balanced(tmp_path, wanted=Wanted(url=url))
    assert only(one)[0].base == "https://llm.example.com/v1"
    two = balanced(tmp_path, deployments="chat, plain", wanted=Wanted(url=url))
    assert two.endpoints[1].base == "https://llm.example.com/plain/v1"


@pytest.mark.parametrize(
    "url", ["llm.example.com", "ftp://llm.example.com", "https://", "https://a:b@llm.example.com"]
)
def test_what_is_no_address_is_wrong_usage(tmp_path, url):
    with pytest.raises(UsageError, match="--url"):
        balanced(tmp_path, wanted=Wanted(url=url))


def test_a_local_phase_is_on_loopback_and_has_ollamas_api(tmp_path):
    got = found(tmp_path, "here", "local")
    endpoint, model = only(got)
    assert (endpoint.base, got.ollama) == ("http://127.0.0.1:11434/v1", "http://127.0.0.1:11434")
    assert (got.key, model.name, got.clear) == ("", "local-coder", False)


def test_engines_on_loopback_elsewhere_are_out_of_reach(tmp_path):
    with pytest.raises(Error, match=r"loopback of gpu-01.*balancer.*ssh -N -L 8000:127") as caught:
        found(tmp_path, "gpu-01", "chat")
    assert not isinstance(caught.value, UsageError)
    got = found(tmp_path, "gpu-01", "chat", wanted=Wanted(url="http://127.0.0.1:8000"))
    assert only(got)[0].base == "http://127.0.0.1:8000/v1"
    assert got.key == "ENGINE_KEY"
    with pytest.raises(UsageError, match="an engine for each of chat, plain"):
        found(tmp_path, "gpu-01", "chat, plain", wanted=Wanted(url="http://127.0.0.1:8000"))


def test_clear_text_is_told(tmp_path):
    assert any("in clear" in note for note in balanced(tmp_path).notes)
    safe = f"{{hosts: [lb-01], port: 443, api_keys: {{a: !env A}}, {TLS}}}"
    assert not any("in clear" in note for note in balanced(tmp_path, safe).notes)


# gateways

GATEWAY = """gateway: {hosts: [lb-02], api_keys: {
    alice: !env ALICE_KEY, bob: {key: !file bob.key, models: [bge-m3, fast]}},
    models: {fast: {context_length: 65536, max_output: 4096, vision: true, tools: false,
                    pools: {cloud: 1}}},
    providers: {cloud: {url: "https://api.example.com", models: {fast: huge}, key: !env CLOUD}}}"""


def gated(tmp_path, user):
    roles = f"balancer: {{hosts: [lb-01], port: 80, server_name: llm.example.com}}, {GATEWAY}"
    wanted = Wanted(user=user)
    return found(tmp_path, "gpu-01, lb-01, lb-02", "chat, embed", roles, wanted)


def test_a_gateway_has_all_models_under_one_address(tmp_path):
    got = gated(tmp_path, "alice")
    (endpoint,) = got.endpoints
    assert (endpoint.name, endpoint.base) == ("inferfleet-p", "http://llm.example.com/v1")
    assert (got.ollama, got.gateway, got.key) == ("http://llm.example.com", True, "ALICE_KEY")
    assert {m.name: m for m in endpoint.models} == {
        "qwen2.5-coder": Served("qwen2.5-coder", 16384, 4096, tools=True),
        "bge-m3": endpoint.models[1],
        "fast": Served("fast", 65536, 4096, vision=True),
    }


def test_a_user_of_a_gateway_sees_the_models_of_the_key(tmp_path):
    got = gated(tmp_path, "bob")
    assert [m.name for m in got.endpoints[0].models] == ["bge-m3", "fast"]
    assert got.key == "INFERFLEET_BOB_KEY"


def test_a_gateway_before_which_nothing_stands(tmp_path):
    public = "gateway: {hosts: [lb-02], listen: public, api_keys: {a: !env A}}"
    got = found(tmp_path, "gpu-01, lb-02", "chat", public)
    assert only(got)[0].base == "http://192.0.2.22:8080/v1"
    with pytest.raises(Error, match=r"gateway listens on loopback of lb-02"):
        found(tmp_path, "gpu-01, lb-02", "chat", public.replace("listen: public, ", ""))


# keys

KEYS = "{hosts: [lb-01], port: 80, api_keys: {alice: !env ALICE_KEY, web-ui: !file web.key}}"


@pytest.mark.parametrize(
    ("user", "variable"),
    [("alice", "ALICE_KEY"), ("web-ui", "INFERFLEET_WEB_UI_KEY"), ("", "INFERFLEET_KEY")],
)
def test_the_variable_with_the_key(tmp_path, user, variable):
    got = balanced(tmp_path, KEYS, wanted=Wanted(user=user))
    assert got.key == variable
    assert any("alice, web-ui" in note for note in got.notes) == (not user)


def test_the_only_user_needs_no_name_and_an_unknown_one_is_wrong_usage(tmp_path):
    assert balanced(tmp_path).key == "ALICE_KEY"
    with pytest.raises(UsageError, match=r"'alce' \(did you mean alice\?\)"):
        balanced(tmp_path, wanted=Wanted(user="alce"))
    with pytest.raises(UsageError, match="no users"):
        found(tmp_path, "here", "local", wanted=Wanted(user="alice"))


# sizes


@pytest.mark.parametrize(
    ("options", "context", "output"),
    [
        ("context_length: 8192", 8192, 2048),
        ("context_length: 65536", 32768, 8192),  # Ollama never goes beyond the model's own
        ("context_length: 8192, modelfile: {parameters: {num_ctx: 4096}}", 4096, 1024),
    ],
)
def test_ollamas_context(tmp_path, options, context, output):
    _, model = only(found(tmp_path, "here", "local", options=options))
    assert (model.context, model.output, model.input) == (context, output, context - output)


def test_a_context_that_nobody_knows_is_an_error(tmp_path):
    with pytest.raises(Error, match=r"deployments.local: .*set context_length among its options"):
        found(tmp_path, "here", "local", options="context_length: 0")


def test_vllms_context_is_what_is_asked_for_else_the_models(tmp_path):
    sizes = [m.context for _, m in balanced(tmp_path, deployments="chat, plain").chats()]
    assert sizes == [16384, 32768]


def test_a_rehearsal_has_the_simulators_context_and_no_tools(tmp_path):
    _, model = only(balanced(tmp_path, rehearse=True))
    assert (model.context, model.tools) == (16384, False)


@given(st.integers(1, 10**7))
def test_prompt_and_answer_fit_the_context(tokens):
    output = share(tokens)
    assert 1 <= output <= LONGEST_ANSWER
    assert Served("m", tokens, output).input + output == tokens


def instance(engine, repository, *arguments, **options):
    model = Model("m", repository, served_name="m")
    made = Deployment("d", engine, model, ("h",), 8000, extra_args=tuple(arguments))
    return Instance(made, Host("h", "192.0.2.1"), 0, 8000, (), "127.0.0.1", options)


@pytest.mark.parametrize(
    ("engine", "made", "able"),
    [
        ("vllm", instance("vllm", "Qwen/Qwen3-8B"), False),
        ("vllm", instance("vllm", "Qwen/Qwen3-8B", tool_call_parser="hermes"), True),
        ("vllm", instance("vllm", "Qwen/Qwen3-8B", "--tool-call-parser=hermes"), True),
        ("ollama", instance("ollama", "qwen2.5-coder:7b"), True),
        ("ollama", instance("ollama", "library/llama3.1"), True),
        ("ollama", instance("ollama", "gemma2:9b"), False),
        ("ollama", instance("ollama", "/srv/models/qwen3"), False),
        ("ollama", instance("ollama", "qwen3", modelfile={"template": "{{ .Prompt }}"}), False),
        ("ollama", instance("ollama", "gemma2", modelfile={"template": "{{ .Tools }}"}), True),
        ("tgi", instance("tgi", "Qwen/Qwen3-8B"), True),
        ("tgi", instance("tgi", "Qwen/Qwen3-8B", "--disable-grammar-support"), False),
        ("simulator", instance("vllm", "Qwen/Qwen3-8B", tool_call_parser="hermes"), False),
    ],
)
def test_tools_are_offered_only_where_the_engine_reads_them(engine, made, able):
    assert abilities(engine, [made]).tools is able


@pytest.mark.parametrize(
    ("repository", "sees", "embeds"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", True, False),
        ("qwen2.5vl:7b", True, False),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", True, False),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", False, False),
        ("nomic-embed-text", False, True),
        ("BAAI/bge-m3", False, True),
        ("mistralai/Devstral-Small", False, False),
    ],
)
def test_names_that_say_what_a_model_does(repository, sees, embeds):
    made = abilities("vllm", [instance("vllm", repository)])
    assert (made.vision, made.embeddings) == (sees, embeds)
    assert abilities("vllm", [instance("vllm", "a/b", "--runner", "pooling")]).embeddings


def test_a_deployment_can_what_all_its_instances_can():
    options = [{"max_model_len": 8192, "tool_call_parser": "hermes"}, {"max_model_len": 4096}]
    made = abilities("vllm", [instance("vllm", "a/b", **own) for own in options])
    assert (made.context, made.tools) == (4096, False)
    assert (
        abilities("vllm", [instance("vllm", "a/b", **own) for own in (*options, {})]).context
        is None
    )


# formats

CODER = Served("qwen2.5-coder", 32768, 8192, tools=True)
PLAIN = Served("plain", 8192, 2048)
EYES = Served("eyes", 16384, 4096, tools=True, vision=True)
EMBED = Served("bge-m3", 8192, 2048, embeddings=True)


def reached(*models, base="https://llm.example.com/v1", key="ALICE_KEY", ca="", **more):
    own = Endpoint("inferfleet-p", base, models or (CODER,))
    return Access("p", (own,), key, ca, **more)


# As extensions/copilot/package.json and customEndpointProvider.ts of VS Code 1.122 to 1.145 have it
_FLAG, _SIZE = {"type": "boolean"}, {"type": "integer", "minimum": 1}
_WORD = {"type": "string", "minLength": 1}
_MODEL = {
    "id": _WORD,
    "name": _WORD,
    "url": {"type": "string", "pattern": "^https?://[^/]+/.*chat/completions$"},  # used as it is
    "toolCalling": _FLAG,
    "vision": _FLAG,
    "maxInputTokens": _SIZE,
    "maxOutputTokens": _SIZE,
}
VSCODE = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "vendor", "models"],
        "additionalProperties": False,
        "properties": {
            "name": _WORD,
            "vendor": {"const": "customendpoint"},
            "apiKey": {"type": "string", "pattern": r"^\$\{input:chat\.lm\.secret\.[a-z0-9-]+\}$"},
            "apiType": {"enum": ["chat-completions", "responses", "messages"]},
            "models": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": list(_MODEL),
                    "properties": _MODEL,
                },
            },
        },
    },
}


def test_vscode_gets_groups_of_the_models_that_write_text():
    made = configuration("vscode", reached(CODER, EYES, EMBED))
    (group,) = json.loads(made.text)
    jsonschema.validate([group], VSCODE)
    assert group["apiKey"] == "${input:chat.lm.secret.inferfleet-p}"
    assert [(m["id"], m["maxInputTokens"], m["maxOutputTokens"]) for m in group["models"]] == [
        ("qwen2.5-coder", 24576, 8192),
        ("eyes", 12288, 4096),
    ]
    assert [m["vision"] for m in group["models"]] == [False, True]


def test_vscode_gets_a_group_for_each_address_and_no_key_where_none_is_asked():
    two = tuple(Endpoint(f"inferfleet-p-{n}", f"http://h/{n}/v1", (CODER,)) for n in "ab")
    groups = json.loads(configuration("vscode", Access("p", two)).text)
    jsonschema.validate(groups, VSCODE)
    assert [group["models"][0]["url"] for group in groups] == [
        "http://h/a/v1/chat/completions",
        "http://h/b/v1/chat/completions",
    ]
    assert not any("apiKey" in group for group in groups)


@pytest.mark.parametrize("client", ["vscode", "continue", "cline", "opencode"])
def test_editors_are_told_that_a_model_cannot_be_offered_tools(client):
    told = [n for n in configuration(client, reached(PLAIN, CODER)).notes if "plain" in n]
    assert len(told) == 1
    assert "qwen2.5-coder" not in told[0]
    assert not any("tools" in note for note in configuration(client, reached(CODER)).notes)


def test_continue_gets_roles_and_abilities():
    made = yaml.safe_load(configuration("continue", reached(CODER, PLAIN, EMBED)).text)
    assert [(m["name"], m["roles"], m.get("capabilities")) for m in made["models"]] == [
        ("qwen2.5-coder", ["chat", "edit", "apply", "summarize"], ["tool_use"]),
        ("plain", ["chat", "edit", "apply", "summarize"], []),
        ("qwen2.5-coder autocomplete", ["autocomplete"], None),
        ("bge-m3", ["embed"], None),
    ]
    assert {m["apiKey"] for m in made["models"]} == {"${{ secrets.ALICE_KEY }}"}


def test_the_ca_is_given_as_each_client_takes_it():
    ca = "/etc/ssl/fleet.pem"
    one = yaml.safe_load(configuration("continue", reached(ca=ca)).text)["models"]
    assert {m["requestOptions"]["caBundlePath"] for m in one} == {ca}
    for client in ("vscode", "cline", "opencode"):
        notes = configuration(client, reached(ca=ca)).notes
        assert any(f"NODE_EXTRA_CA_CERTS={ca}" in note for note in notes)
    assert f"--cacert {ca}" in configuration("curl", reached(ca=ca)).text
    for client in ("openai", "huggingface"):
        assert ca in configuration(client, reached(ca=ca)).text
        assert "ssl" not in configuration(client, reached()).text


def test_hugging_face_is_told_what_its_extension_needs():
    made = configuration("huggingface", reached(PLAIN))
    assert 'BASE_URL = "https://llm.example.com/v1"' in made.text
    assert '"huggingface.customTGIEndpoint": "https://llm.example.com"' in made.text
    assert any("list of models stays empty" in note for note in made.notes)
    assert any("refuses every prompt for plain" in note for note in made.notes)
    more = configuration("huggingface", reached(CODER, gateway=True, key=""))
    assert not more.notes


@pytest.mark.parametrize(("context", "refused"), [(16000, True), (16001, False)])
def test_the_extension_keeps_16000_tokens_for_the_answer(context, refused):
    notes = configuration("huggingface", reached(Served("m", context, 4000))).notes
    assert any("refuses every prompt" in note for note in notes) is refused


def test_ollama_is_only_where_its_api_is():
    with pytest.raises(Error, match=r"no Ollama API.*gateway.*--for openai"):
        configuration("ollama", reached())
    made = configuration("ollama", reached(ollama="https://llm.example.com"))
    assert 'host="https://llm.example.com"' in made.text
    assert "OLLAMA_HOST" not in made.text  # the command would send no key
    local = reached(key="", base="http://127.0.0.1:11434/v1", ollama="http://127.0.0.1:11434")
    said = configuration("ollama", local).text
    assert "# The command line: OLLAMA_HOST=http://127.0.0.1:11434 ollama run" in said


def test_a_phase_of_embeddings_alone_is_of_no_use_here():
    with pytest.raises(Error, match="only embeddings"):
        configuration("vscode", reached(EMBED))


def test_an_unknown_client_is_wrong_usage():
    with pytest.raises(UsageError, match=r"'vscod' \(did you mean vscode\?\); known are vscode"):
        configuration("vscod", reached())
    with pytest.raises(UsageError, match="which client"):
        configuration("", reached())


# names from the inventory stay inside their quotes

hostile = st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1)
hostile |= st.sampled_from(
    ["'", '"', "`id`", "$(id)", "a\\", "{x}", "#", "!x", "%s", "- a", "a: b"]
)


@given(hostile, hostile)
def test_hostile_names_arrive_as_they_are(name, path):
    got = reached(Served(name, 32768, 8192, tools=True), ca=path, ollama="https://h")
    (group,) = json.loads(configuration("vscode", got).text)
    assert group["models"][0]["id"] == name
    (provider,) = json.loads(configuration("opencode", got).text)["provider"].values()
    assert list(provider["models"]) == [name]
    first = yaml.safe_load(configuration("continue", got).text)["models"][0]
    assert (first["model"], first["requestOptions"]["caBundlePath"]) == (name, path)
    words = shlex.split(configuration("curl", got).text)
    assert json.loads(words[words.index("--data") + 1])["model"] == name
    assert words[words.index("--cacert") + 1] == path
    words = shlex.split(configuration("cline", got).text, comments=True)
    assert words[words.index("--modelid") + 1] == name
    for client in ("openai", "huggingface", "ollama"):
        tree = ast.parse(configuration(client, got).text)
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert {name, path} <= strings


@pytest.mark.parametrize("name", ["a\\nimport os", "a\\u2028b", "a\\x1b[2J"])
def test_names_that_end_a_comment_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setitem(
        globals(),
        "MODELS",
        MODELS.replace("served_name: qwen2.5-coder,", f'served_name: "{name}",'),
    )
    with pytest.raises(Error, match="no client's file can take"):
        balanced(tmp_path)


# writing


def made(client="vscode", *models):
    return configuration(client, reached(*models))


def test_what_is_not_there_is_written_once(tmp_path):
    path = tmp_path / "User" / "chatLanguageModels.json"
    assert writing.write(path, made()) == "written"
    assert path.read_text() == made().text
    before = path.stat()
    assert writing.write(path, made()) == "as it was"
    assert path.stat().st_ino == before.st_ino
    assert list(path.parent.iterdir()) == [path]


def test_vscodes_other_groups_the_entered_key_and_settings_stay(tmp_path):
    path = tmp_path / "models.json"
    other = {
        "vendor": "ollama",
        "name": "Ollama",
        "url": "http://127.0.0.1:11434",
        "ü": [1.5, None],
    }
    key = "${input:chat.lm.secret.-3a2aa0b0}"
    (ours,) = json.loads(made("vscode", PLAIN).text)
    ours |= {"apiKey": key, "settings": {"plain": {"x": 1}}}
    namesake = {"vendor": "openai", "name": "inferfleet-p"}
    path.write_text(json.dumps([other, ours, namesake], indent="\t"))
    path.chmod(0o600)
    assert writing.write(path, made()).startswith("brought up to date")
    first, second, third = json.loads(path.read_text())
    assert (first, third) == (other, namesake)
    assert (second["apiKey"], second["settings"]) == (key, {"plain": {"x": 1}})
    assert [model["id"] for model in second["models"]] == ["qwen2.5-coder"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "\n\t{" in path.read_text()
    assert writing.write(path, made()) == "as it was"


def test_opencodes_other_providers_and_chosen_model_stay(tmp_path):
    path = tmp_path / "opencode.json"
    mine = {"theme": "x", "model": "mine/m", "provider": {"mine": {"npm": "n"}}}
    path.write_text(json.dumps(mine))
    writing.write(path, made("opencode"))
    now = json.loads(path.read_text())
    assert (now["theme"], now["model"]) == ("x", "mine/m")
    assert list(now["provider"]) == ["mine", "inferfleet-p"]
    assert writing.write(path, made("opencode")) == "as it was"


@pytest.mark.parametrize(
    ("client", "there"),
    [
        ("vscode", "[\n  // mine\n]\n"),
        ("vscode", '[{"name": "a",}]'),
        ("vscode", '[{"name": "a", "name": "b"}]'),
        ("vscode", '{"name": "a"}'),
        ("vscode", "[1]"),
        ("opencode", "[]"),
        ("opencode", '{"provider": []}'),
        ("continue", "name: mine\n"),
        ("openai", "print(1)\n"),
    ],
)
def test_what_would_be_damaged_is_left_alone(tmp_path, client, there):
    path = tmp_path / "file"
    path.write_text(there)
    with pytest.raises(Error, match=str(path)):
        writing.write(path, made(client))
    assert path.read_text() == there
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("client", ["vscode", "continue"])
def test_an_empty_file_is_as_good_as_none(tmp_path, client):
    path = tmp_path / "file"
    path.write_text("\n")
    assert writing.write(path, made(client)).startswith("brought up to date")
    assert path.read_text() == made(client).text


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_text("[]")
    (tmp_path / "link.json").symlink_to("real.json")
    writing.write(tmp_path / "link.json", made())
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())


def test_a_merge_is_one_that_is_known():
    for client in CLIENTS:
        found = configuration(client, reached(ollama="https://llm.example.com"))
        assert found.merge in ("", *writing._MERGES)
        assert isinstance(found, Configuration)


# the command


def run(folder, *words, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "inferfleet", "clients", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


@pytest.fixture
def example(tmp_path):
    shutil.copytree(ROOT / "inventory", tmp_path / "inventory")
    return tmp_path


@pytest.mark.parametrize("client", CLIENTS)
def test_the_command_prints_no_key_and_touches_nothing(example, client):
    done = run(example, "--phase", "production", "--for", client, INFERFLEET_KEY="s3cret")
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    assert "llm.example.com" in done.stdout
    assert "qwen2.5-coder" in done.stdout
    assert [path.name for path in example.iterdir()] == ["inventory"]


def test_notes_go_beside_the_text(example):
    done = run(example, "--phase", "pilot", "--for", "vscode")
    json.loads(done.stdout)
    assert re.search(r"^note: VS Code keeps the key itself", done.stderr, re.MULTILINE)


def test_the_command_as_json(example):
    words = ["--phase", "pilot", "--for", "opencode", "--json"]
    done = run(example, *words)
    told = json.loads(done.stdout)
    assert (told["ok"], told["variable"]) == (True, "INFERFLEET_PILOT_KEY")
    assert json.loads(told["content"])["$schema"] == "https://opencode.ai/config.json"
    again = json.loads(run(example, *words, "--write", "opencode.json").stdout)
    assert again["written"] == "written"
    assert (example / "opencode.json").read_text() == again["content"]


def test_the_command_writes_and_says_what_it_did(example):
    words = ["--phase", "local", "--for", "continue", "--write", "config.yaml"]
    assert run(example, *words).stdout == "config.yaml: written.\n"
    assert run(example, *words).stdout == "config.yaml: as it was.\n"
    (example / "config.yaml").write_text("name: mine\n")
    done = run(example, *words)
    assert (done.returncode, (example / "config.yaml").read_text()) == (1, "name: mine\n")
    assert "not ours to change; without --write" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--phase", "pilot"], 2, "which client"),
        (["--phase", "pilt", "--for", "curl"], 2, "did you mean pilot?"),
        (["--phase", "pilot", "--for", "curl", "--user", "x"], 2, "it has pilot-team"),
        (["--phase", "pilot", "--for", "ollama"], 1, "no Ollama API"),
    ],
)
def test_what_cannot_be_has_its_exit_code(example, words, code, said):
    done = run(example, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
