"""Names and model lists, read as their clients read them."""

import json

import ollama as client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Model

from inferfleet.gateway.fronts import ollama_models
from inferfleet.gateway.fronts.models import Names, Served, openai_model, openai_models
from inferfleet.gateway.request import BadRequest

NOW = 1_790_000_000
CODER = Served(
    "qwen2.5-coder",
    aliases=("coder", "coder:7b"),
    context_length=32768,
    max_output=8192,
    tools=True,
    vision=True,
    created=1_780_000_000,
    providers=("inferfleet", "old", "inferfleet"),
    details={"family": "qwen2", "parameter_size": "32B", "capabilities": ["insert", "tools"]},
)
EMBED = Served("org/embed:latest", embeddings=True)
NAMES = Names([CODER, EMBED])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5-coder", "qwen2.5-coder"),
        ("coder", "qwen2.5-coder"),
        ("coder:7b", "qwen2.5-coder"),
        ("coder:8b", None),
        ("coder:latest", "qwen2.5-coder"),
        ("coder:7b:latest", None),
        ("coder:fastest", "qwen2.5-coder"),
        ("coder:7b:cheapest", "qwen2.5-coder"),
        ("qwen2.5-coder:preferred", "qwen2.5-coder"),
        ("qwen2.5-coder:old", "qwen2.5-coder"),
        ("qwen2.5-coder:unknown", None),
        ("Qwen2.5-Coder:Latest", "qwen2.5-coder"),
        ("org/embed", "org/embed:latest"),
        ("org/embed:latest", "org/embed:latest"),
        ("embed", None),
        ("", None),
        (":latest", None),
    ],
)
def test_names(name, expected):
    assert NAMES.resolve(name) == expected


def test_what_is_written_wins_over_what_is_derived():
    names = Names(
        [Served("a"), Served("a:fastest"), Served("A"), Served("b", aliases=("a:latest",))]
    )
    assert [names.resolve(n) for n in ("a", "a:fastest", "A", "a:latest", "A:fastest", "B")] == [
        "a",
        "a:fastest",
        "A",
        "b",
        "A",
        "b",
    ]


def extension(entry):
    """Ids with their largest prompts, as the Hugging Face extension makes them of an entry."""
    providers = entry.get("providers") or []
    able = [one for one in providers if one.get("supports_tools") is True]

    def most(lengths):
        return max(1, min(lengths) - 16000)

    if not able:
        return {entry["id"]: most([p.get("context_length", 128000) for p in providers[:1]])}
    shared = most([p.get("context_length", 128000) for p in able])
    own = {f"{entry['id']}:{p['provider']}": most([p["context_length"]]) for p in able}
    return {f"{entry['id']}:cheapest": shared, f"{entry['id']}:fastest": shared} | own


def test_the_extension_shows_each_name_and_asks_for_ids_that_are_known():
    data = json.loads(openai_models([CODER], NOW))["data"]
    assert [entry["id"] for entry in data] == ["qwen2.5-coder", "coder", "coder:7b"]
    for entry in data:
        shown = extension(entry)
        assert set(shown) == {
            f"{entry['id']}:{suffix}" for suffix in ("cheapest", "fastest", "inferfleet", "old")
        }
        assert {NAMES.resolve(name) for name in shown} == {"qwen2.5-coder"}
        assert set(shown.values()) == {16768}
        assert "image" in entry["architecture"]["input_modalities"]
        assert entry["max_model_len"] == 32768


@given(st.integers(2, 10**6))
def test_the_extension_never_refuses_half_of_the_context(length):
    entry = json.loads(openai_model(Served("m", context_length=length), "m", NOW))
    [most] = extension(entry).values()
    assert length // 2 <= most <= max(length // 2, length - 16000)
    assert entry["max_model_len"] == length


def test_the_openai_package_reads_the_list():
    found = json.loads(openai_models([CODER, EMBED], NOW, broken={"org/embed:latest"}))
    models = [Model.model_validate(entry) for entry in found["data"]]
    assert [model.created for model in models] == [1_780_000_000] * 3 + [NOW]
    assert {model.owned_by for model in models} == {"inferfleet"}
    last = found["data"][-1]
    assert [one["status"] for one in last["providers"]] == ["error"]
    assert "context_length" not in last["providers"][0]
    assert "max_model_len" not in last
    assert last["architecture"]["output_modalities"] == ["embedding"]
    assert found["data"][0]["providers"][0]["status"] == "live"


def test_the_ollama_package_reads_the_lists():
    listed = client.ListResponse(**json.loads(ollama_models.tags([CODER, EMBED], NOW)))
    assert [model.model for model in listed.models] == [
        "qwen2.5-coder:latest",
        "coder:latest",
        "coder:7b",
        "org/embed:latest",
    ]
    assert all(NAMES.resolve(model.model) for model in listed.models)
    assert len(listed.models[0].digest) == 64
    assert listed.models[0].digest == listed.models[1].digest != listed.models[3].digest
    assert listed.models[0].modified_at.timestamp() == 1_780_000_000
    assert listed.models[3].modified_at.timestamp() == NOW
    running = client.ProcessResponse(**json.loads(ollama_models.ps([CODER])))
    assert running.models[0].context_length == 32768
    assert running.models[0].expires_at.year > 2300


def test_the_ollama_package_reads_what_is_shown():
    shown = client.ShowResponse(**json.loads(ollama_models.show(CODER, NOW)))
    assert shown.capabilities == ["completion", "tools", "vision", "insert"]
    assert shown.modelinfo["general.architecture"] == "qwen2"
    assert shown.modelinfo["qwen2.context_length"] == 32768
    assert "{{ .Suffix }}" in shown.template
    assert shown.parameters.split() == ["num_ctx", "32768", "num_predict", "8192"]
    assert shown.details.parameter_size == "32B"
    other = client.ShowResponse(**json.loads(ollama_models.show(EMBED, NOW)))
    assert other.capabilities == ["embedding"]
    assert other.parameters == ""
    assert ".Suffix" not in other.template


def test_pulling_what_is_served_succeeds_at_once():
    status, kind, body = ollama_models.pull(b'{"model": "coder"}', NAMES)
    assert (status, kind) == (200, "application/x-ndjson")
    parts = [client.ProgressResponse(**json.loads(line)) for line in body.splitlines()]
    assert [part.status for part in parts] == ["pulling manifest", "success"]
    _, kind, body = ollama_models.pull(b'{"name": "coder", "stream": false}', NAMES)
    assert (kind, json.loads(body)) == ("application/json; charset=utf-8", {"status": "success"})


def test_what_only_operators_may_is_refused():
    status, _, body = ollama_models.pull(b'{"model": "llama3"}', NAMES)
    assert status == 404
    assert "operators" in json.loads(body)["error"]
    assert ollama_models.refused().status == 403
    assert json.loads(ollama_models.missing("x").body) == {"error": "model 'x' not found"}
    for body in (b"", b"[]", b"{}", b'{"model": 1}', b'{"model": "\xff"}'):
        with pytest.raises(BadRequest):
            ollama_models.asked(body)


def test_the_version_is_one_that_clients_compare():
    assert all(part.isdigit() for part in json.loads(ollama_models.version())["version"].split("."))
