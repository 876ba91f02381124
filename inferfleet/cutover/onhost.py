"""Asks a gateway's workers, and gives them orders: sent to its host on standard input.

Standard library only, Python 3.8 or newer. Nothing of it stays on the host.
"""

import http.client
import json
import sys
import time
from typing import Any, Dict, List, Tuple

TIMEOUT = 10.0  # seconds for one answer
PATIENCE = 10.0  # seconds until all workers have followed; they look every second
PAUSE = 0.05


class Unable(Exception):
    """A worker that gave no answer, or not the one that was hoped for."""


def ask(address: str, method: str, path: str, body: Any = None) -> Any:
    """The JSON that a worker answers. Unable when it does not."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=TIMEOUT)
    content = None if body is None else json.dumps(body)
    try:
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise Unable("%s does not answer: %s" % (address, error or repr(error)))
    finally:
        connection.close()
    if answer.status != 200:
        raise Unable("%s: %s %s: %d %s" % (address, method, path, answer.status, said[:300]))
    return json.loads(said)


def positive(weights: Dict[str, float]) -> Dict[str, float]:
    """The pools that get anything."""
    return {pool: weight for pool, weight in weights.items() if weight}


def followed(status: Dict[str, Any], wanted: List[Tuple[str, Dict[str, float]]]) -> bool:
    """Whether a worker has the weights that were told to one of them."""
    models = status["models"]
    return all(positive(models[name]["weights"]) == positive(told) for name, told in wanted)


def answer(request: Dict[str, Any]) -> List[Any]:
    """Give the `orders` to the first of the `workers`; what all say once they have followed."""
    workers = request["workers"]
    told = [
        (order["model"], ask(workers[0], order["method"], order["path"], order["weights"]))
        for order in request["orders"]
    ]
    end = time.monotonic() + PATIENCE
    found = [ask(worker, "GET", "/status") for worker in workers]
    while not all(followed(status, told) for status in found):
        if time.monotonic() > end:
            raise Unable("its workers did not all follow within %g s" % PATIENCE)
        time.sleep(PAUSE)
        found = [ask(worker, "GET", "/status") for worker in workers]
    for worker, status in zip(workers, found):
        status["shadow"] = ask(worker, "GET", "/shadow?samples=true") if request["shadow"] else {}
    return found


def main(text: str) -> None:
    """One JSON document on standard output, whatever happened."""
    try:
        said: Dict[str, Any] = {"workers": answer(json.loads(text))}
    except Unable as unable:
        said = {"error": str(unable)}
    json.dump(said, sys.stdout)
