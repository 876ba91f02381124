"""What a comparison of two pools says, and which answers it is made from."""

import json

import pytest
from relaykit import DONE, event, fleet, plain, run, stream, until

from inferfleet.gateway.shadow import NOTHING, gist

EVENTS = [event("one "), event("two"), DONE]


def chunk(**delta):
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


def tool(index, name=None, **more):
    return {"index": index, "function": {"arguments": "{", **({"name": name} if name else {})}}


def ended(reason):
    choice = {"index": 0, "delta": {}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"".join([*EVENTS[:2], ended("stop"), DONE]), ("one two", "stop", ())),
        (
            b'{"choices": [{"message": {"content": "hi", "tool_calls": null},\n'
            b'  "finish_reason": "length", "stop_reason": null}]}',
            ("hi", "length", ()),
        ),
        (
            chunk(tool_calls=[tool(0, "look")])
            + chunk(tool_calls=[tool(0)])
            + chunk(tool_calls=[tool(1, "read")])
            + ended("tool_calls"),
            ("", "tool_calls", ("look", "read")),
        ),
        (b'{"choices": [{"text": "more", "finish_reason": "stop"}]}', ("more", "stop", ())),
        (
            b'{"message": {"role": "assistant", "content": "a"}, "done": false}\n'
            b'{"message": {"content": "b"}, "done": true, "done_reason": "stop"}\n',
            ("ab", "stop", ()),
        ),
        (b'{"response": "a", "done": true, "done_reason": "length"}', ("a", "length", ())),
        (
            b'{"content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn"}',
            ("hi", "end_turn", ()),
        ),
        (
            b'event: x\ndata: {"type": "response.output_text.delta", "delta": "hi"}\n\n',
            ("hi", "", ()),
        ),
        (b'{"object": "list", "data": [{"embedding": [0.5]}]}', NOTHING),
        (b'{"choices": [7], "tool_calls": [3]}', NOTHING),
        (b"\xff\n[1, 2]\n", NOTHING),
    ],
)
def test_the_gist_of_an_answer_in_any_format(body, found):
    assert gist(body) == found


def two(weights, percent=100):
    """The second engine in a pool of its own, which is shadowed."""

    def change(settings, engines):
        new = {"name": "n", "url": f"http://127.0.0.1:{engines[1].port}"}
        settings["pools"]["p"]["instances"] = settings["pools"]["p"]["instances"][:1]
        settings["pools"]["new"] = {"backend": "vllm", "model": "m2", "instances": [new]}
        shadow = {"pool": "new", "percent": percent}
        settings["models"]["m"] |= {"pools": weights, "shadow": shadow}

    return change


async def told(found, more=""):
    answer = await found.client.get(f"http://127.0.0.1:{found.private}/shadow{more}")
    return answer.json()["m"]


def test_only_what_another_pool_answered_is_copied(tmp_path):
    async def body():
        behaviours = stream(*EVENTS), stream(*EVENTS)
        async with fleet(tmp_path, *behaviours, change=two({"p": 0, "new": 1})) as found:
            assert (await found.chat(stream=True)).status_code == 200
            assert len(found.engines[1].prompts) == 1
            put = f"http://127.0.0.1:{found.private}/models/m/weights"
            assert (await found.client.put(put, json={"p": 1})).status_code == 200
            assert (await found.chat(stream=True)).status_code == 200
            await until(lambda: found.worker.shadows.copies["m"].compared)
            assert len(found.engines[1].prompts) == 2
            assert (await told(found))["asked"] == 1

    run(body())


def test_samples_are_given_to_be_merged(tmp_path):
    async def body():
        other = stream(event("one "), event("three"), DONE, first=0.1)
        change = two({"p": 1, "new": 0})
        async with fleet(tmp_path, stream(*EVENTS), other, change=change) as found:
            await found.chat(stream=True)
            await until(lambda: found.worker.shadows.copies["m"].compared)
            (sample,) = (await told(found, "?samples=true"))["samples"]
            assert (sample["same_text"], sample["same_end"]) == (False, True)
            assert 0.5 < sample["likeness"] < 1
            assert sample["length"] == pytest.approx(9 / 7)
            assert sample["first_token"][0] < 0.05 <= sample["first_token"][1]
            assert (
                await found.metric(
                    'inferfleet_gateway_shadow_requests_total{model="m",outcome="answered",pool="new"}'
                )
                == 1
            )

    run(body())


@pytest.mark.parametrize(
    ("behaviour", "why"), [(plain(401, {"error": "who?"}), "status 401"), (None, "can be asked")]
)
def test_why_a_copy_failed_is_said(tmp_path, behaviour, why):
    async def body():
        engines = stream(*EVENTS), behaviour or plain()
        async with fleet(tmp_path, *engines, change=two({"p": 1, "new": 0})) as found:
            if behaviour is None:
                found.worker.core.pools["new"].instances[0].draining = True
            await found.chat(stream=True)
            copies = found.worker.shadows.copies["m"]
            await until(lambda: copies.failed)
            assert why in (await told(found))["failure"]

    run(body())


def test_the_status_tells_requests_by_pool_and_both_weights(tmp_path):
    async def body():
        engines = stream(*EVENTS), plain(500, {"error": "broken"})
        async with fleet(tmp_path, *engines, change=two({"p": 1, "new": 0}, 0.001)) as found:
            await found.chat(stream=True)
            put = f"http://127.0.0.1:{found.private}/models/m/weights"
            await found.client.put(put, json={"p": 0, "new": 5})
            assert (await found.chat()).status_code == 500
            model = (await found.status())["models"]["m"]
            assert model["configured"] == {"p": 1, "new": 0}
            assert model["weights"] == {"p": 0, "new": 5}
            assert model["requests"] == {
                "p": {"requests": 1, "failed": 0},
                "new": {"requests": 1, "failed": 1},
            }

    run(body())


def test_weights_set_by_hand_end_when_the_configuration_says_the_same(tmp_path):
    """Or they would come back with the next change of the configuration."""
    kept = tmp_path / "weights.json"
    state = {"change": two({"p": 1, "new": 3}), "state": str(tmp_path)}

    async def body():
        kept.write_text('{"m": {"p": 1.0, "new": 3.0}, "gone": {"q": 1}}')
        async with fleet(tmp_path, plain(), plain(), **state):
            await until(lambda: kept.read_text() == "{}")
        kept.write_text('{"m": {"p": 0, "new": 1}}')
        async with fleet(tmp_path, plain(), plain(), **state) as found:
            route = found.worker.core.routes["m"]
            await until(lambda: route.weights == {"p": 0, "new": 1})
            delete = f"http://127.0.0.1:{found.private}/models/m/weights"
            assert (await found.client.delete(delete)).json() == {"p": 1, "new": 3}
            assert kept.read_text() == "{}"

    run(body())
