"""`python -m inferfleet.gateway --config FILE`: serve, check the file, or reload a gateway."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from inferfleet.gateway.config import ConfigError, load
from inferfleet.gateway.keys import Keys, KeysError

PATIENCE = 90.0  # seconds until new workers must serve


def main() -> int:
    """Exit code 1 for what is wrong with configuration or keys, told in one line."""
    parser = argparse.ArgumentParser(prog="python -m inferfleet.gateway", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="the configuration (JSON)")
    parser.add_argument("--check", action="store_true", help="only read configuration and keys")
    parser.add_argument("--state-file", type=Path, help="where to say which workers serve")
    parser.add_argument("--reload", type=int, metavar="PID", help="let that gateway reload")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    try:
        if wanted.worker:
            from inferfleet.gateway.worker import main as work

            slot, public, private, ready = map(int, wanted.worker.split(","))
            work(str(wanted.config), slot, public, private, ready)
            return 0
        config = load(wanted.config)
        Keys(Path(config.keys) if config.keys else None)
        if wanted.check:
            return 0
        if wanted.reload:
            return reload(wanted.reload, wanted.state_file)
        return supervise(wanted.config, wanted.state_file)
    except (ConfigError, KeysError) as error:
        print(error, file=sys.stderr)
        return 1


def supervise(path: Path, state: Path | None) -> int:
    """Serve until SIGTERM."""
    from inferfleet.gateway.supervisor import Supervisor

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")

    async def run() -> int:
        return await Supervisor(path, load(path), state).run()

    return asyncio.run(run())


def reload(pid: int, state: Path | None) -> int:
    """Ask a gateway for new workers, and wait until they serve, if it says so anywhere."""
    before = told(state)
    os.kill(pid, signal.SIGHUP)
    end = time.monotonic() + PATIENCE
    while state and told(state)["generation"] == before["generation"]:
        if told(state)["failures"] != before["failures"] or time.monotonic() > end:
            print("new workers did not come up; see the gateway's log", file=sys.stderr)
            return 1
        time.sleep(0.05)
    return 0


def told(state: Path | None) -> dict[str, int]:
    """How many sets of workers came up, and how many did not, as the supervisor says."""
    try:
        found = json.loads(state.read_text()) if state else {}
    except (OSError, ValueError):
        found = {}
    return {name: int(found.get(name, 0)) for name in ("generation", "failures")}


if __name__ == "__main__":
    sys.exit(main())
