"""Which weights are asked for, what many gateways' answers come to, and all of them or none."""

import asyncio
import re
import shutil
import subprocess
import sys
import textwrap
from contextlib import AsyncExitStack
from pathlib import Path

import make
import pytest
from relaykit import fleet, plain, run, until

from inferfleet.cutover import back, move, showing, sites, state, survey, wanted
from inferfleet.cutover.asking import Site
from inferfleet.errors import UsageError
from inferfleet.model import Host
from inferfleet.transport import Options

INVENTORY = """\
    hosts:
      gpu-01: {address: 192.0.2.1, gpus: [{model: L40S, count: 1}]}
      gw-01: {address: 192.0.2.11}
      gw-02: {address: 192.0.2.12}
    models:
      hub: {repository: /srv/hub, served_name: coder-7b, context_length: 32768}
    deployments:
      new: {engine: simulator, model: hub, hosts: [gpu-01], port: 8000, api_key: !env K}
    phases:
      p:
        users: 1
        why: w
        hosts: [gpu-01, gw-01, gw-02]
        deployments: [new]
        roles:
          gateway:
            hosts: [gw-01, gw-02]
            workers: 2
            api_keys: {web: !env K}
            providers:
              old: {url: "https://api.example.com", models: {coder-7b: x, other: y}}
            models: {coder-7b: {aliases: [coder], pools: {old: 9, new: 1}}}
"""


@pytest.fixture
def found(tmp_path):
    project = make.project(tmp_path, own=INVENTORY)
    plan = project.plan("p")
    return sites(plan, plan.hosts)


def test_the_example_of_the_documentation_is_an_inventory(tmp_path):
    page = Path(__file__).parents[1] / "docs/cutover.md"
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    text = textwrap.dedent(INVENTORY).replace("coder-7b", "qwen2.5-coder").replace("new", "coder")
    text = text[: text.index("      gateway:")] + textwrap.indent(block, " " * 6)
    text = text.replace("[gateways]", "[gw-01, gw-02]")
    plan = make.project(tmp_path, own=text).plan("p")
    for each in sites(plan, plan.hosts):
        model = each.models["qwen2.5-coder"]
        assert model["pools"] == {"coder": 0, "old": 100}
        assert model["shadow"] == {"pool": "coder", "percent": 5}
        assert wanted.weights("coder=10,old=90", each) == {"coder": 10, "old": 90}


# what is asked for


def test_gateways_and_their_workers_are_those_of_the_plan(found):
    assert [site.host.name for site in found] == ["gw-01", "gw-02"]
    assert found[0].workers == ("127.0.0.1:9400", "127.0.0.1:9401")
    assert found[0].models["coder-7b"]["pools"] == {"new": 1, "old/coder-7b": 9}


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("new", {"new": 100, "old/coder-7b": 0}),
        ("old", {"new": 0, "old/coder-7b": 100}),
        ("old/coder-7b=1", {"new": 0, "old/coder-7b": 1}),
        ("new=10, old=90%", {"new": 10, "old/coder-7b": 90}),
        ("new=0.5,old=0", {"new": 0.5, "old/coder-7b": 0}),
    ],
)
def test_pools_are_called_what_the_inventory_calls_them(found, text, weights):
    assert wanted.weights(text, found[0].only(wanted.model("coder", found))) == weights


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nwe", "'nwe' is no pool of 'coder-7b' (did you mean new?); it has new, old/coder-7b"),
        ("new=10,old", "'old' lacks its weight, such as old=10"),
        ("new,old", "'new' lacks its weight"),
        ("new=-1,old=2", "a weight is a number from 0 on, not '-1'"),
        ("new=nan", "a weight is a number from 0 on, not 'nan'"),
        ("new=ten", "a weight is a number from 0 on, not 'ten'"),
        ("new=0,old=0", "one pool at least needs a weight above 0"),
    ],
)
def test_weights_that_mean_nothing(found, text, said):
    with pytest.raises(UsageError) as caught:
        wanted.weights(text, found[0].only("coder-7b"))
    assert said in str(caught.value)


def test_a_model_is_named_where_there_are_several(found):
    assert wanted.model("other", found) == "other"
    assert wanted.model("", [site.only("other") for site in found]) == "other"
    for asked, said in (("", "which model?"), ("othre", "did you mean other?")):
        with pytest.raises(UsageError) as caught:
            wanted.model(asked, found)
        assert said in str(caught.value)
        assert "coder-7b, other" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--phase", "p", "--to", "new", "--back"], "say either --to or --back"),
        (["--phase", "p", "--limit", "gpu-01"], "no host here is a gateway of phase 'p'"),
        (["--phase", "p", "--to", "new"], "which model?"),
        (["--phase", "p", "--model", "coder", "--to", "newer"], "(did you mean new?)"),
    ],
)
def test_wrong_usage_is_two_and_asks_no_host(tmp_path, words, said):
    make.write(tmp_path, own=INVENTORY)
    argv = [sys.executable, "-m", "inferfleet", "cutover", *words]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


# what all of them say


def worker(weights, configured=None, requests=None, samples=(), **numbers):
    own = {"pool": "new", "percent": 5.0, "asked": 0, "failed": 0, "dropped": 0, "failure": ""}
    shadow = own | numbers | {"samples": list(samples)}
    model = {"weights": weights, "configured": configured or weights, "requests": requests or {}}
    return {"began": 1.0, "models": {"m": model}, "shadow": {"m": shadow}}


def site(name, **pools):
    return Site(Host(name, "192.0.2.1"), ("127.0.0.1:1",), {"m": {"pools": pools}}, {}, {"m": {}})


def sample(first, seconds, text=True, likeness=1.0):
    same = {"same_text": text, "same_end": True, "same_tools": True}
    return {"first_token": first, "seconds": seconds, "likeness": likeness, "length": 1.0, **same}


def test_shares_are_compared_and_not_the_numbers():
    assert state.shares({"a": 9, "b": 1, "c": 0}) == state.shares({"b": 10.0, "a": 90})
    (model,) = state.models(
        [
            (site("x", a=9, b=1), [worker({"a": 9, "b": 1})]),
            (site("y", a=9, b=1), [worker({"a": 90, "b": 10})]),
        ]
    )
    assert (model.differing, model.overridden, model.behind) == ([], [], [])


def test_gateways_that_differ_are_overridden_or_behind_are_told_apart():
    inventory = {"a": 1, "b": 0}
    (model,) = state.models(
        [
            (site("x", **inventory), [worker({"a": 1, "b": 0})] * 2),
            (site("hand", **inventory), [worker({"a": 1, "b": 0}), worker({"b": 1}, inventory)]),
            (site("late", **inventory), [worker({"a": 1, "b": 1})]),
            (site("new", **inventory), [{"began": 1.0, "models": {}, "shadow": {}}]),
        ]
    )
    assert model.differing == ["hand", "late"]
    assert model.overridden == ["hand"]
    assert model.behind == ["late", "new"]


def test_requests_are_summed_over_workers():
    some = worker({"a": 1}, requests={"a": {"requests": 3, "failed": 1}})
    more = worker({"a": 1}, requests={"a": {"requests": 2, "failed": 0}, "b": {"requests": 1}})
    (model,) = state.models([(site("x", a=1), [some, more])])
    assert model.at[0].requests == {"a": {"requests": 5, "failed": 1}, "b": {"requests": 1}}


def test_quantiles_are_those_of_all_samples_and_not_means_of_quantiles():
    few = worker({"a": 1}, samples=[sample((9.0, 1.0), (9.0, 2.0), False, 0.5)], asked=2, failed=1)
    many = worker({"a": 1}, samples=[sample((1.0, 0.1), (2.0, 0.2))] * 39, asked=39)
    few["shadow"]["m"]["failure"] = "status 401"
    (model,) = state.models([(site("x", a=1), [few]), (site("y", a=1), [many])])
    (report,) = model.shadows
    assert (report["asked"], report["failed"], report["compared"]) == (41, 1, 40)
    assert (report["percent"], report["failures"]) == ([5.0], ["status 401"])
    assert report["first_token"] == {
        "clients": {"p50": 1.0, "p95": 1.0},
        "copies": {"p50": 0.1, "p95": 0.1},
    }
    assert report["same_text"] == 39 / 40
    assert (report["likeness_median"], report["same_end"]) == (1.0, 1.0)


def test_a_shadow_without_a_comparison_yet():
    (model,) = state.models([(site("x", a=1), [worker({"a": 1})])])
    assert model.shadows[0]["compared"] == 0
    assert "first_token" not in model.shadows[0]


# real gateways, on this machine


OPTIONS = Options()


def two(settings, engines):
    new = {"name": "n", "url": f"http://127.0.0.1:{engines[1].port}"}
    settings["pools"]["p"]["instances"] = settings["pools"]["p"]["instances"][:1]
    settings["pools"]["new"] = {"backend": "vllm", "model": "m2", "instances": [new]}
    settings["models"]["m"]["pools"] = {"p": 1, "new": 0}
    settings["models"]["m"]["shadow"] = {"pool": "new", "percent": 100}


class Two:
    """Two gateways, each with two pools, as sites on hosts that are this one."""

    def __init__(self, folder):
        self.folders = [folder / "a", folder / "b"]
        self.stack = AsyncExitStack()

    async def __aenter__(self):
        self.gateways = []
        for folder in self.folders:
            (folder / "state").mkdir(parents=True)
            made = fleet(folder, plain(), plain(), change=two, state=str(folder / "state"))
            self.gateways.append(await self.stack.enter_async_context(made))
        return self

    async def __aexit__(self, *why):
        await self.stack.__aexit__(*why)

    def sites(self):
        hosts = [Host(name, "127.0.0.1", connection="local") for name in ("a", "b")]
        models = {"m": {"pools": {"p": 1, "new": 0}}}
        return [
            Site(host, (f"127.0.0.1:{gateway.private}",), models, {}, {"m": {}})
            for host, gateway in zip(hosts, self.gateways, strict=True)
        ]

    def weights(self):
        return [gateway.worker.core.routes["m"].weights for gateway in self.gateways]

    async def do(self, task, *more):
        return await asyncio.to_thread(task, self.sites(), OPTIONS, *more)


def test_all_gateways_move_and_go_back(tmp_path):
    async def body():
        async with Two(tmp_path) as both:
            await both.gateways[0].chat()
            outcome = await both.do(move, {"p": 90, "new": 10})
            assert outcome.changed
            assert showing.fine(outcome)
            assert both.weights() == [{"p": 90, "new": 10}] * 2
            (told,) = showing.warnings(outcome, "x")
            assert "set by hand at a, b. To stay, write it to the inventory; to go back:" in told
            copies = both.gateways[0].worker.shadows.copies["m"]
            await until(lambda: copies.compared)
            (model,) = (await both.do(survey)).models
            assert model.at[0].requests == {"p": {"requests": 1, "failed": 0}}
            assert model.shadows[0]["compared"] == 1
            outcome = await both.do(back)
            assert outcome.changed
            assert both.weights() == [{"p": 1, "new": 0}] * 2
            assert list(showing.warnings(outcome, "x")) == []
            assert not (await both.do(back)).changed

    run(body())


@pytest.mark.parametrize("first", [None, {"p": 90.0, "new": 10.0}])
def test_when_one_cannot_follow_all_are_as_they_were(tmp_path, first):
    async def body():
        async with Two(tmp_path) as both:
            if first:
                await both.do(move, first)
            shutil.rmtree(tmp_path / "b/state")
            outcome = await both.do(move, {"p": 0, "new": 1})
            assert not outcome.changed
            assert not showing.fine(outcome)
            assert "weights.json: no such file" in outcome.failed["b"]
            assert outcome.undone == {"a": "", "b": ""}
            assert both.weights() == [first or {"p": 1, "new": 0}] * 2
            (tmp_path / "b/state").mkdir()

    run(body())


def test_a_gateway_that_is_silent_keeps_the_others_from_moving_but_not_from_going_back(tmp_path):
    async def body():
        async with Two(tmp_path) as both:
            await both.do(move, {"p": 0, "new": 1})
            *_, last = both.sites()
            silent = [
                both.sites()[0],
                Site(last.host, ("127.0.0.1:1",), last.models, {}, {"m": {}}),
            ]
            outcome = await asyncio.to_thread(move, silent, OPTIONS, {"p": 1, "new": 1})
            assert "127.0.0.1:1 does not answer: " in outcome.failed["b"]
            assert (outcome.changed, outcome.undone) == (False, {})
            assert both.weights() == [{"p": 0, "new": 1}] * 2
            outcome = await asyncio.to_thread(back, silent, OPTIONS)
            assert (outcome.changed, list(outcome.failed)) == (True, ["b"])
            assert both.weights() == [{"p": 1, "new": 0}, {"p": 0, "new": 1}]

    run(body())


def test_pools_that_cannot_be_asked_or_are_not_known_get_nothing(tmp_path):
    async def body():
        async with Two(tmp_path) as both:
            both.gateways[1].worker.core.pools["new"].instances[0].draining = True
            outcome = await both.do(move, {"p": 1, "new": 1})
            assert outcome.failed == {"b": "no instance of new can be asked there"}
            outcome = await both.do(move, {"p": 1, "newer": 1})
            assert {"provision it first" in why for why in outcome.failed.values()} == {True}
            assert both.weights() == [{"p": 1, "new": 0}] * 2

    run(body())
