"""The gateway beside its peers, on loopback: each one process on core 1, all else on core 0.

    python bench/gateway.py [--peers inferfleet,litellm,...] [--only requests,streams,...]
                            [--seconds 5] [--rounds 3] [--json]

A stand-in for vLLM and the load generator (bench/gateway/*.c, compiled at the first run; needs a
C compiler, Linux and two cores) cost a few microseconds a request. Rounds are interleaved: each
peer has its turn in every round; of its rounds that one counts in which it waited least for its
core, so that what else runs on the machine disturbs little. Run by root, it also takes precedence
over that. LiteLLM and vllm-router are installed into ~/.cache/inferfleet/bench at the first run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gateway import measures, table
from gateway.measures import Figures, Target
from gateway.peers import KEY, PEERS, MissingError, Peer, Site
from gateway.processes import (
    LOAD_CORE,
    TEST_CORE,
    Engine,
    Load,
    Running,
    free_port,
    load,
    pinned,
    tail,
    wait_for_port,
)

PARTS = ("requests", "streams", "prompts", "memory", "leaving", "retry")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="by default all of them")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, by default all")
    parser.add_argument("--seconds", type=float, default=5, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    found = parser.parse_args()
    found.peers = [word for word in found.peers.split(",") if word and word != "direct"]
    found.only = [word for word in found.only.split(",") if word]
    for word, known in [(w, PEERS) for w in found.peers] + [(w, PARTS) for w in found.only]:
        if word not in known:
            parser.error(f"there is no '{word}'; there are {', '.join(known)}")
    return found


def say(text: str) -> None:
    """Progress goes where the tables do not."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def serving(peer: Peer, engines: list[int], folder: Path) -> Iterator[tuple[int, Running]]:
    """The peer, started and answering; MissingError where it cannot be had."""
    folder.mkdir()
    site = Site(folder, free_port(), engines)
    log = folder / "output.log"
    with Running(peer.command(site), TEST_CORE, log, peer.env) as running:
        try:
            wait_for_port(running, site.port, patience=120)
            answering(site, log)
        except (ChildProcessError, TimeoutError) as error:
            raise MissingError(str(error)) from None
        yield site.port, running


def answering(site: Site, log: Path, patience: float = 60) -> None:
    """Returns once a request succeeds."""
    request = site.folder / "first.json"
    request.write_bytes(measures.body())
    until = time.monotonic() + patience
    while not (found := load(site.port, KEY, Load(request, 1, 0.05)))["good"]:
        if time.monotonic() > until:
            raise TimeoutError(f"it answers {found['statuses']}: {tail(log)}")
        time.sleep(0.2)


def started(names: list[str], engine: Engine, folder: Path, stack: ExitStack) -> list[Target]:
    """Those that can be had, behind `direct`."""
    targets = [Target("direct", engine.port, None, engine)]
    for name in names:
        try:
            port, process = stack.enter_context(serving(PEERS[name], [engine.port], folder / name))
        except MissingError as error:
            say(f"{name} is left out: {error}")
            continue
        targets.append(Target(name, port, process, engine))
    return targets


def loads(only: list[str], seconds: float, folder: Path) -> dict[str, Callable[[Target], Figures]]:
    """The parts that are measured in every round."""
    files = measures.bodies(folder)
    parts: dict[str, Callable[[Target], Figures]] = {
        "requests": lambda target: measures.requests(target, files, seconds),
        "streams 100": lambda target: measures.streams(target, files, seconds, 100),
        "streams 500": lambda target: measures.streams(target, files, seconds, 500),
        "prompts": lambda target: measures.prompts(target, files, seconds),
        "memory": measures.memory,
    }
    return {name: parts[name] for name in parts if name.split()[0] in only}


def one_round(
    targets: list[Target], parts: dict[str, Callable[[Target], Figures]]
) -> dict[str, dict[str, Figures]]:
    """Each part for each peer, part by part, so that those compared are close in time."""
    found: dict[str, dict[str, Figures]] = {target.name: {} for target in targets}
    for part, measure in parts.items():
        for target in targets:
            say(f"  {part}: {target.name}")
            figures = found[target.name][part] = measure(target)
            figures |= measures.added(figures, found["direct"][part])
    return found


def retried(targets: list[Target], folder: Path) -> dict[str, Figures]:
    """The retry of those that retry, each started anew with an engine that resets before it."""
    found = {}
    with Engine(folder / "bad.log", resets=True) as bad:
        for target in targets:
            peer = PEERS.get(target.name)
            if peer is None or not peer.retries:
                continue
            say(f"  retry: {peer.name}")
            engines = [bad.port, target.engine.port]
            try:
                with serving(peer, engines, folder / f"{peer.name}-retry") as (port, _):
                    found[peer.name] = measures.retries(port, bad)
            except MissingError as error:
                say(f"{peer.name}, with two engines: {error}")
    return found


def measured(asked: argparse.Namespace, folder: Path) -> dict[str, Figures]:
    """Of all rounds, by peer."""
    rounds: list[dict[str, dict[str, Figures]]] = []
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(folder / "engine.log"))
        wait_for_port(engine)
        targets = started(asked.peers, engine, folder, stack)
        parts = loads(asked.only, asked.seconds, folder)
        for number in range(asked.rounds if parts else 0):
            say(f"round {number + 1} of {asked.rounds}, load average {os.getloadavg()[0]:.1f}")
            rounds.append(one_round(targets, parts))
        if "leaving" in asked.only:
            left = {t.name: measures.leaving(t) for t in targets if t.process}
            rounds.append({name: {"leaving": figures} for name, figures in left.items()})
        if "retry" in asked.only:
            again = retried(targets, folder)
            rounds.append({name: {"retry": figures} for name, figures in again.items()})
    names = [target.name for target in targets]
    return {name: table.summary([each[name] for each in rounds if name in each]) for name in names}


def printable(found: dict[str, Figures]) -> str:
    """JSON; `null` is what never happened."""
    clean = {
        name: {k: None if math.isinf(v) else round(v, 6) for k, v in sorted(figures.items())}
        for name, figures in found.items()
    }
    return json.dumps(clean, indent=1)


def interrupted(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def main() -> None:
    asked = arguments()
    pinned(LOAD_CORE, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    before = os.getloadavg()[0]
    try:
        with tempfile.TemporaryDirectory(prefix="bench-gateway-") as folder:
            found = measured(asked, Path(folder))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if asked.json:
        print(printable(found))
        return
    print(table.peers(found))
    if "inferfleet" in found:
        print("\n" + table.verdicts(found["inferfleet"], found.get("litellm", {})))
    print(f"\nload average {before:.1f} before, {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
