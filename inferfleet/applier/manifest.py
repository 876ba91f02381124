"""What a generation says of a host's files, and what follows from another; touches nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    Json = dict[str, Any]

UNITS = "/etc/systemd/system"
ENTRY = ("sha256", "mode", "owner", "group", "restarts", "reloads")


def generation(request: Json, old: Json, directories: Iterable[str]) -> Json:
    """The manifest that follows `old` when a request was carried out; `directories` are ours."""
    return {
        "generation": old["generation"] + 1,
        "phase": request["phase"],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "owner": request["owner"],
        "reason": request["reason"],
        "files": {
            file["path"]: {"role": part["role"], **{key: file[key] for key in ENTRY}}
            for part in request["parts"]
            for file in part["files"]
        },
        "directories": sorted(directories),
    }


def same(old: Json, new: Json) -> bool:
    """Whether two manifests say the same of the files."""
    return all(old[key] == new[key] for key in ("phase", "files", "directories"))


def named(file: Json) -> list[str]:
    """The units a file restarts or reloads."""
    return [*file["restarts"], *file["reloads"]]


def stops(gone: Iterable[str], files: dict[str, Json]) -> dict[str, str]:
    """Units to stop, with the unit file each loses; of a template, the units that were named."""
    found = {}
    known: set[str] = set().union(*map(named, files.values()))
    for path in gone:
        directory, _, name = path.rpartition("/")
        stem, at, suffix = name.partition("@.")
        instances = [u for u in known if u.startswith(stem + "@") and u.endswith("." + suffix)]
        if directory == UNITS and "." in name:
            found.update(dict.fromkeys(sorted(instances) if at else [name], path))
    return found
