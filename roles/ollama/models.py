#!/usr/bin/env python3
"""Brings a model into an Ollama server, and proves that it sits on the GPUs.

    models.py make URL SPEC           pull the model; create it anew when SPEC changes it
    models.py has URL SPEC            is it there, as SPEC says?
    models.py on-gpu URL NAME SHARE   load it; is at least SHARE of it in GPU memory?
    models.py still URL NAME SHARE    the same where it is loaded; yes where it is not

SPEC is a JSON file: name, from (a tag, or the path of a GGUF file on this host), parameters,
system, template. What a model was made of is kept in SPEC.made: the server does not tell.
Exit status 0: yes, or done; 1: no, with the reason. Python 3.8+, standard library alone, one file.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # not so at run time: Python 3.8 cannot subscript these
    from collections.abc import Iterator

    Json = dict[str, Any]

SILENCE = 600  # seconds between two signs of life: loading a large model takes minutes
BLOCK = 1 << 20  # bytes
CHANGES = ("parameters", "system", "template")


class Failed(Exception):
    """What the server refused, or what is not as it should be."""


def request(url: str, body: Any = None, length: int = 0) -> http.client.HTTPResponse:
    """The server's answer; `body` is JSON, or `length` bytes to read. Failed with its words."""
    data = body if length else None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data)  # noqa: S310 - the server's own URL
    if length:
        asked.add_header("Content-Length", str(length))
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(asked, timeout=SILENCE)  # noqa: S310
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode("utf-8", "replace").strip()
        raise Failed(f"{url}: {error.code}: {said or error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{url}: {error}") from error
    return answer


def asked(url: str, body: Any = None) -> Json:
    """A JSON answer."""
    with request(url, body) as answer:
        found: Json = json.load(answer)
    return found


def steps(url: str, body: Json) -> Iterator[Json]:
    """What a streaming answer tells, a line at a time. Failed on an error in it, or a cut."""
    last: Json = {}
    with request(url, body) as answer:
        for line in answer:
            last = json.loads(line)
            if "error" in last:
                raise Failed(f"{url}: {last['error']}")
            yield last
    if last.get("status") != "success":
        raise Failed(f"{url}: the answer ended before it was done")


def follow(url: str, body: Json) -> None:
    """Print a streaming answer's progress: a line for every status, overwritten at each percent."""
    doing = seen = ""
    for step in steps(url, body):
        status, total = step.get("status", ""), step.get("total")
        share = f": {100 * step.get('completed', 0) // total} %" if total else ""
        size = f" of {total / 2**30:.1f} GiB" if total else ""
        if seen and status != doing:
            print()
        if status + share != seen:
            print(f"{status}{share}{size}", end="\r", flush=True)
        doing, seen = status, status + share
    print()


def digest(spec: Json) -> str:
    """Of all that goes into a model; a file counts by its size and time."""
    parts = [json.dumps(spec, sort_keys=True)]
    if spec["from"].startswith("/"):
        found = Path(spec["from"]).stat()
        parts.append(f"{found.st_size} {found.st_mtime_ns}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def names(url: str) -> set[str]:
    """Every model of the server, also without the tag that is meant when none is given."""
    found = {model["name"] for model in asked(f"{url}/api/tags")["models"]}
    return found | {name[: -len(":latest")] for name in found if name.endswith(":latest")}


def has(url: str, path: Path) -> None:
    """Failed unless the server has the model as the file says."""
    spec, made = json.loads(path.read_text()), path.with_suffix(".made")
    if spec["name"] not in names(url):
        raise Failed(f"the server has no model {spec['name']}")
    if not made.exists() or made.read_text() != digest(spec):
        raise Failed(f"{spec['name']} was not made as {path} says")


def make(url: str, path: Path) -> None:
    """Pull or upload what the model is made from, then give it its name."""
    spec = json.loads(path.read_text())
    source, changes = spec["from"], {key: spec[key] for key in CHANGES if spec.get(key)}
    if source.startswith("/"):
        files = {Path(source).name: uploaded(url, Path(source))}
        follow(f"{url}/api/create", {"model": spec["name"], "files": files, **changes})
    else:
        follow(f"{url}/api/pull", {"model": source})
        if changes:
            follow(f"{url}/api/create", {"model": spec["name"], "from": source, **changes})
        elif spec["name"] != source:
            request(f"{url}/api/copy", {"source": source, "destination": spec["name"]}).close()
    path.with_suffix(".made").write_text(digest(spec))


def uploaded(url: str, path: Path) -> str:
    """The digest of a file that the server has after this."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            hashed.update(block)
        name, length = f"sha256:{hashed.hexdigest()}", file.tell()
        file.seek(0)
        if not _has_blob(f"{url}/api/blobs/{name}"):
            print(f"uploading {path} ({length / 2**30:.1f} GiB)", flush=True)
            request(f"{url}/api/blobs/{name}", file, length).close()
    return name


def _has_blob(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SILENCE):  # noqa: S310
            return True
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise Failed(f"{url}: {error}") from error


def on_gpu(url: str, name: str, share: float) -> None:
    """Load the model, and Failed when less than `share` of it is in GPU memory."""
    asked(f"{url}/api/generate", {"model": name, "stream": False})
    if not still(url, name, share):
        raise Failed(f"{name} was asked for and is not loaded")


def still(url: str, name: str, share: float) -> bool:
    """Whether the model is loaded; Failed when it is, with less than `share` in GPU memory."""
    loaded = {model["name"]: model for model in asked(f"{url}/api/ps")["models"]}
    model = loaded.get(name) or loaded.get(f"{name}:latest")
    if model is None:
        return False
    size, inside = model["size"], model.get("size_vram", 0)
    if inside < share * size:
        where = "on the CPU" if not inside else f"{inside / size:.0%} on GPUs"
        raise Failed(
            f"{name} runs {where}: {inside / 2**30:.1f} of {size / 2**30:.1f} GiB are in GPU memory"
            "; is the driver loaded, do model and context fit? (min_gpu_share: how much has to)"
        )
    print(f"{name}: {inside / 2**30:.1f} of {size / 2**30:.1f} GiB are in GPU memory")
    return True


def main(words: list[str]) -> int:
    try:
        if words[0] in ("on-gpu", "still"):
            look = on_gpu if words[0] == "on-gpu" else still
            look(words[1], words[2], float(words[3]))
        else:
            {"has": has, "make": make}[words[0]](words[1], Path(words[2]))
    except (Failed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
