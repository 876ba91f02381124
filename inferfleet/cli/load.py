"""The task that puts an endpoint under load: bench."""

from __future__ import annotations

from invoke.context import Context

from inferfleet.cli.command import (
    FINE,
    INTERRUPTED,
    INVENTORY,
    JSON,
    PROBLEMS,
    REHEARSE,
    command,
)
from inferfleet.errors import UsageError


@command(
    phase="the phase whose own address is put under load",
    url="any endpoint instead, such as http://127.0.0.1:8000",
    model="what is asked for (default: the only one there is)",
    api="what a URL speaks: openai or ollama (default: openai; a phase is known)",
    key="a URL's key by reference: env:NAME, file:PATH or cmd:COMMAND",
    user="whose key of the phase (default: the first)",
    ca="PEM file of the authority that signed the certificate",
    against="a second phase or URL to compare with, measured in turns",
    against_model="the second target's model",
    against_api="the second target's API",
    against_key="the second target's key",
    against_user="the second target's user",
    before="a result that --json saved, to compare with",
    concurrency="requests at once, step by step (default: 1,2,4,8,16; of a phase at most 256)",
    seconds="how long each step lasts (default: 20)",
    requests="how many requests each step has, in place of --seconds",
    repeats="how often each step is measured (default: 1; 3 where two are compared)",
    prompt_tokens="length of the prompts, which all differ (default: 512)",
    output_tokens="length of the answers at most (default: 128)",
    shared_prefix="tokens of the prompts' beginning that are the same in all (default: none)",
    ignore_eos="have vLLM make answers of full length",
    timeout="seconds one request may take (default: 300)",
    html="write the result as a page to this file",
    svg="write the plot to this file",
    inventory=INVENTORY,
    rehearse=REHEARSE,
    json=JSON,
)
def bench(
    _: Context,
    phase: str = "",
    url: str = "",
    model: str = "",
    api: str = "",
    key: str = "",
    user: str = "",
    ca: str = "",
    against: str = "",
    against_model: str = "",
    against_api: str = "",
    against_key: str = "",
    against_user: str = "",
    before: str = "",
    concurrency: str = "1,2,4,8,16",
    seconds: str = "",
    requests: str = "",
    repeats: str = "",
    prompt_tokens: str = "",
    output_tokens: str = "",
    shared_prefix: str = "",
    ignore_eos: bool = False,
    timeout: str = "",
    html: str = "",
    svg: str = "",
    inventory: str = "inventory",
    rehearse: bool = False,
    json: bool = False,
) -> int:
    """Put a phase or any URL under load with real streams: rates, latencies, errors by step."""
    from inferfleet.load import bench as load

    if bool(phase) == bool(url):
        raise UsageError("say either --phase or --url")
    places = [load.Place(phase or url, model, api, key, user, ca)]
    if against:
        other = against_model, against_api, against_key, against_user
        places.append(load.Place(against, *other, ca))
    asked = load.method(
        concurrency, seconds, requests, repeats, timeout,
        load.workload(prompt_tokens, output_tokens, shared_prefix, ignore_eos=ignore_eos),
        compared=bool(against or before),
    )  # fmt: skip
    found = load.run(places, asked, inventory, before, rehearse=rehearse, quiet=json)
    load.show(found, html, svg, as_json=json)
    if found.interrupted:
        return INTERRUPTED
    return FINE if load.fine(found) else PROBLEMS
