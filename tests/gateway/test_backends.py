"""What the kinds of engines tell, and what they are told."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.gateway.backends import Load, adapt, error_text, parse_load, probe, proves

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {b} c"} 2.0
vllm:num_requests_running{engine="1",model_name="a {b} c"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 4.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 100.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+01
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 9.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 9.0
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 7.0
"""
TGI = """\
# TYPE tgi_queue_size gauge
tgi_queue_size 3

tgi_batch_current_size 5 1700000000000
tgi_batch_inference_success{method="prefill"} 4
tgi_batch_inference_success{method="decode"} 60
tgi_request_generated_tokens_sum 12
tgi_request_generated_tokens_count 2
"""


def test_load_is_summed_over_the_engines():
    assert parse_load("vllm", VLLM) == Load(3, 4, 122.0)
    assert parse_load("vllm", VLLM.replace("\n", "\r\n")) == Load(3, 4, 122.0)
    assert parse_load("tgi", TGI) == Load(5, 3, 76.0)


def test_a_page_without_load_tells_none():
    assert parse_load("vllm", TGI) is None
    assert parse_load("ollama", VLLM) is None
    assert parse_load("vllm", "") is None
    assert parse_load("vllm", 'vllm:num_requests_running{a="b"} NaN\n') is None
    assert parse_load("tgi", "tgi_queue_size 1\n") == Load(0, 1, None)


@given(st.text())
def test_no_page_breaks_the_scan(text):
    parse_load("vllm", text + "\nvllm:num_requests_running" + text)


@pytest.mark.parametrize(
    ("kind", "embeddings", "path"),
    [
        ("vllm", False, "/v1/completions"),
        ("tgi", False, "/v1/completions"),
        ("openai", False, "/v1/chat/completions"),
        ("ollama", False, "/api/generate"),
        ("vllm", True, "/v1/embeddings"),
        ("ollama", True, "/api/embed"),
    ],
)
def test_a_probe_asks_for_one_token(kind, embeddings, path):
    call = probe(kind, "m", embeddings)
    sent = json.loads(call.body)
    assert (call.path, sent["model"], call.shape) == (path, "m", None)
    if not embeddings:
        options = sent.get("options", sent)
        assert options.get("num_predict", options.get("max_tokens")) == 1
        assert options["temperature"] == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            {
                "choices": [{"text": "", "finish_reason": "length"}],
                "usage": {"completion_tokens": 1},
            },
            1,
        ),
        ({"choices": [{"text": "2"}]}, 1),
        ({"choices": [{"text": ""}], "usage": {"completion_tokens": 0}}, 0),
        ({"choices": [{"message": {"content": None, "reasoning": "a"}}]}, 1),
        ({"choices": [{"message": {"content": ""}}]}, 0),
        ({"response": "", "eval_count": 1, "done": True}, 1),
        ({"response": "", "done": True, "done_reason": "load"}, 0),
        ({"data": [{"embedding": [0.0]}]}, 1),
        ({"data": [{"embedding": []}]}, 0),
        ({"embeddings": [[0.0, 1.0]]}, 1),
        ({"embeddings": [[]]}, 0),
        ({"status": "ok"}, 0),
        ([1], 0),
    ],
)
def test_only_a_token_proves_that_an_engine_works(answer, expected):
    assert proves(json.dumps(answer).encode()) is bool(expected)


@pytest.mark.parametrize("body", [b"", b"<html>ok</html>", b"\xff", b"[" * 100000])
def test_other_bodies_prove_nothing(body):
    assert not proves(body)


TOO_LONG = "This model's maximum context length is 8192 tokens."


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (  # vLLM from 0.10
            {"error": {"message": TOO_LONG, "type": "BadRequestError", "param": None, "code": 400}},
            (TOO_LONG, "invalid_request_error"),
        ),
        (  # vLLM before
            {"object": "error", "message": TOO_LONG, "type": "BadRequestError", "code": 400},
            (TOO_LONG, "invalid_request_error"),
        ),
        ({"error": "Unauthorized"}, ("Unauthorized", "server_error")),
        (  # TGI
            {"error": "Input validation error", "error_type": "validation"},
            ("Input validation error", "invalid_request_error"),
        ),
        (
            {"error": "Model is overloaded", "error_type": "overloaded"},
            ("Model is overloaded", "rate_limit_error"),
        ),
        ({"error": "model 'x' not found"}, ("model 'x' not found", "server_error")),
        (  # OpenAI
            {"error": {"message": "Slow down", "type": "requests", "code": "rate_limit_exceeded"}},
            ("Slow down", "requests"),
        ),
        ({"detail": "Not Found"}, ("Not Found", "invalid_request_error")),
        (
            {"detail": [{"loc": ["body", "n", 0], "msg": "too many", "type": "x"}]},
            ("body.n.0: too many", "invalid_request_error"),
        ),
        ([{"error": {"message": "in a list", "status": "X"}}], ("in a list", "server_error")),
        ({"error": {"message": None}}, ("the engine gave no reason", "server_error")),
        ({}, ("the engine gave no reason", "server_error")),
    ],
)
def test_errors_are_read_in_all_their_shapes(body, expected):
    assert error_text(json.dumps(body).encode()) == expected


def test_errors_that_are_no_json():
    assert error_text(b"upstream is gone\n") == ("upstream is gone", "server_error")
    assert error_text(b"<html>Bad Gateway</html>")[0] == "the engine gave no reason"
    assert error_text(b"")[0] == "the engine gave no reason"
    assert len(error_text(b"x" * 10_000)[0]) == 500


@given(st.binary(max_size=50) | st.text().map(lambda text: json.dumps({"error": text}).encode()))
def test_every_error_has_a_message_and_a_type(body):
    message, kind = error_text(body)
    assert message
    assert kind


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("kind", "sent", "expected"),
    [
        ("tgi", {"stop": "a"}, {"stop": ["a"]}),
        ("tgi", {"top_p": 1}, {}),
        ("tgi", {"logit_bias": {"1": 2}}, {}),
        ("tgi", {"max_completion_tokens": 5}, {"max_tokens": 5}),
        ("ollama", {"max_completion_tokens": 5, "max_tokens": 4}, {"max_tokens": 4}),
        (
            "ollama",
            {"messages": [{"role": "developer", "content": "a"}, {"role": "user"}]},
            {"messages": [{"role": "system", "content": "a"}, {"role": "user"}]},
        ),
        ("tgi", {"response_format": {"type": "text"}}, {"response_format": None}),
        (
            "tgi",
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_object", "value": {"type": "object"}}},
        ),
        (
            "tgi",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"response_format": {"type": "json_object", "value": SCHEMA}},
        ),
    ],
)
def test_what_a_kind_refuses_is_changed(kind, sent, expected):
    before = json.dumps(sent)
    assert adapt(kind, sent) == expected
    assert json.dumps(sent) == before


def test_what_needs_no_change_is_the_same_object():
    body = {"stop": ["a"], "top_p": 0.5, "n": 2, "x": 1, "messages": [{"role": "user"}]}
    own = {"type": "regex", "value": "a+"}
    for kind in ("vllm", "tgi", "ollama", "openai"):
        assert adapt(kind, body) is body
    assert adapt("tgi", {"response_format": own}) == {"response_format": own}
    developer = {"messages": [{"role": "developer"}], "max_completion_tokens": 1}
    assert adapt("vllm", developer) is developer
