"""The pytest plugin that gives role tests their fixtures: `host`, `step`, `instance`, `ask`.

A test that asks for `instance` runs once per engine instance, one that asks for `step` once per
host; its docstring is what the report says it proves. Each process rebuilds the plan, which is
pure, and opens one connection per host.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host as Testinfra

from inferfleet import transport
from inferfleet.calibration import Observed
from inferfleet.errors import Error, HostError
from inferfleet.model import Instance, Inventory, Plan, Secret, Step
from inferfleet.project import Project
from inferfleet.secrets import scrub
from inferfleet.verify import backend

_STATE = pytest.StashKey["_Fleet"]()


@dataclass
class _Fleet:
    project: Project
    plan: Plan
    hosts: list[str]
    ways: dict[str, transport.Transport] = field(default_factory=dict)
    lost: dict[str, HostError] = field(default_factory=dict)

    def way(self, name: str) -> transport.Transport:
        """The one connection to a host; one that could not be made is not tried for each test."""
        if name in self.lost:
            raise self.lost[name]
        if name not in self.ways:
            host = self.project.inventory.hosts[name]
            try:
                self.ways[name] = transport.connect(host, self.project.options())
            except HostError as error:
                self.lost[name] = error
                raise
        return self.ways[name]


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: `lines` are (seconds since the request, line); `error` if there was none."""

    status: int
    headers: dict[str, str]
    lines: list[tuple[float, str]]
    error: str = ""

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    def json(self) -> Any:
        return json.loads(self.text)

    def events(self) -> list[tuple[float, Any]]:
        """Server-sent events: (seconds, parsed data), without the closing [DONE]."""
        found = []
        for when, line in self.lines:
            if line.startswith("data: ") and line.strip() != "data: [DONE]":
                found.append((when, json.loads(line.removeprefix("data: "))))
        return found


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("inferfleet")
    for name in ("inventory", "phase", "hosts"):
        group.addoption(f"--fleet-{name}", default="")
    for name in ("rehearse", "disruptive"):
        group.addoption(f"--fleet-{name}", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "disruptive: cuts running requests; has a run of its own")
    project = Project(Path(config.getoption("--fleet-inventory")))
    plan = project.plan(
        config.getoption("--fleet-phase"), rehearse=config.getoption("--fleet-rehearse")
    )
    hosts = config.getoption("--fleet-hosts").split(",")
    config.stash[_STATE] = _Fleet(project, plan, hosts)


def pytest_unconfigure(config: pytest.Config) -> None:
    for way in config.stash[_STATE].ways.values():
        way.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    fleet = metafunc.config.stash[_STATE]
    role = Path(metafunc.module.__file__ or "").parent.name
    steps = [s for name in fleet.hosts for s in fleet.plan.steps[name] if s.role == role]
    if "instance" in metafunc.fixturenames:
        pairs = [(step, instance) for step in steps for instance in step.instances]
        ids = [f"{step.host.name}-{instance.name}" for step, instance in pairs]
        metafunc.parametrize(("step", "instance"), pairs, ids=ids, scope="session")
    else:
        ids = [step.host.name for step in steps]
        metafunc.parametrize("step", steps, ids=ids, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, wanted = [], config.getoption("--fleet-disruptive")
    for item in items:
        if bool(item.get_closest_marker("disruptive")) is not wanted:
            continue
        step: Step = item.callspec.params["step"]  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.xdist_group(step.host.name))
        item.user_properties.append(("host", step.host.name))
        item.user_properties.append(("proves", _claim(item)))
        kept.append(item)
    items[:] = kept


def _claim(item: pytest.Item) -> str:
    """What a test proves, in words: its docstring with the instance's name."""
    function = item.function  # type: ignore[attr-defined]
    said = (function.__doc__ or item.name).strip().splitlines()[0]
    instance = item.callspec.params.get("instance")  # type: ignore[attr-defined]
    return f"{instance.name}: {said}" if instance else said


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """No secret leaves in a failure's text, whatever a test compared."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        secrets = item.config.stash[_STATE].project.secrets
        report.user_properties.append(("message", scrub(_why(report, call), secrets)))
        report.longrepr = scrub(str(report.longrepr), secrets)


def _why(report: Any, call: pytest.CallInfo[None]) -> str:
    """Why a test failed, as people say it: without the names of exceptions."""
    if call.excinfo and isinstance(call.excinfo.value, Error):
        return str(call.excinfo.value)
    crash = getattr(report.longrepr, "reprcrash", None)
    said = str(crash.message if crash else report.longrepr)
    return said.removeprefix("AssertionError: ")


@pytest.fixture(scope="session")
def plan(request: pytest.FixtureRequest) -> Plan:
    """The whole phase."""
    return request.config.stash[_STATE].plan


@pytest.fixture(scope="session")
def inventory(request: pytest.FixtureRequest) -> Inventory:
    """The whole inventory."""
    found: Inventory = request.config.stash[_STATE].project.inventory
    return found


@pytest.fixture
def teach(request: pytest.FixtureRequest) -> Callable[[Observed | None], None]:
    """Takes what was seen of an engine's memory, for the next prediction; see calibration."""

    def taught(seen: Observed | None) -> None:
        if seen is not None:
            request.node.user_properties.append(("calibration", json.dumps(asdict(seen))))

    return taught


@pytest.fixture(autouse=True)
def _somewhere(step: Step) -> Step:
    """Every test runs on some host, also one that only asks for an instance."""
    return step


@pytest.fixture
def host(request: pytest.FixtureRequest, step: Step) -> Testinfra:
    """testinfra's host, over our own connection."""
    return backend.host(request.config.stash[_STATE].way(step.host.name))


@pytest.fixture
def reveal(request: pytest.FixtureRequest) -> Callable[[Secret], str]:
    """Resolves a secret that a request needs."""
    return request.config.stash[_STATE].project.secrets.resolve


@pytest.fixture
def ask(request: pytest.FixtureRequest, step: Step) -> Callable[..., Answer]:
    """Makes an HTTP request on the host: ask(url, key=secret or text, json=..., timeout=60)."""
    fleet = request.config.stash[_STATE]
    way = fleet.way(step.host.name)

    def asking(
        url: str,
        *,
        key: Secret | str | None = None,
        json: Any = None,
        method: str = "",
        timeout: float = 60,
    ) -> Answer:
        value = fleet.project.secrets.resolve(key) if isinstance(key, Secret) else key
        return _asked(way, url, value, json, method, timeout)

    return asking


@pytest.fixture
def engine_key(instance: Instance) -> Secret | None:
    """The key the instance's engine asks for."""
    return instance.deployment.api_key


def _asked(
    way: transport.Transport, url: str, key: str | None, body: Any, method: str, timeout: float
) -> Answer:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    request = {
        "url": url,
        "method": method or ("POST" if body is not None else "GET"),
        "headers": headers,
        "body": None if body is None else json.dumps(body),
        "timeout": timeout,
    }
    source = resources.files("inferfleet.verify").joinpath("asker.py").read_text()
    program = f"{source}\nmain({json.dumps(json.dumps(request))})\n"
    done = way.run("python3 -I -", input=program.encode(), timeout=timeout + 30, become=False)
    assert done.status == 0, f"the request could not be made on the host: {done.stderr[-500:]}"
    said = json.loads(done.stdout)
    lines = [(float(when), line) for when, line in said["lines"]]
    return Answer(said["status"], said["headers"], lines, said.get("error", ""))
