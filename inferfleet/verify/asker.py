"""One HTTP request, made on a host: sent there on standard input, standard library only.

It reads the answer as it comes, so that a stream's timing can be judged where no network blurs
it. A key travels in the request on standard input, never on a command line.
"""

import http.client
import json
import ssl
import sys
import time
from typing import Any, Dict
from urllib.parse import urlsplit


def ask(request: Dict[str, Any]) -> Dict[str, Any]:
    """`request`: url, method, headers, body, timeout. Each line comes with when it was read."""
    url = urlsplit(request["url"])
    timeout = request["timeout"]
    if url.scheme == "https":
        # the certificate is for the clients' name, not for the address asked here
        trusting = ssl._create_unverified_context()  # noqa: S323
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            url.hostname, url.port, timeout=timeout, context=trusting
        )
    else:
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=timeout)
    began = time.monotonic()
    body = request["body"].encode() if request["body"] is not None else None
    connection.request(request["method"], url.path or "/", body, request["headers"])
    answer = connection.getresponse()
    lines = []
    while True:
        line = answer.readline()
        if not line:
            break
        lines.append([round(time.monotonic() - began, 4), line.decode("utf-8", "replace")])
    return {"status": answer.status, "headers": dict(answer.getheaders()), "lines": lines}


def main(text: str) -> None:
    try:
        said = ask(json.loads(text))
    except (OSError, http.client.HTTPException) as error:
        said = {"status": 0, "headers": {}, "lines": [], "error": str(error) or repr(error)}
    json.dump(said, sys.stdout)
