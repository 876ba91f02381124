#!/usr/bin/env python3
"""Keeps model weights whole: fetched completely or not at all, by one writer.

    models.py fetch CONFIG                   fetch what is missing, then remove what is not wanted
    models.py check [--wait SECONDS] FOLDER...   complete? by names and sizes, in milliseconds
    models.py verify FOLDER...               complete? by SHA-256, reading everything
    models.py seal FOLDER MODEL REVISION     write the manifest of a folder downloaded by hand

A model is a folder NAME@REVISION. It is filled as NAME@REVISION.partial, compared with what the
source says of it, given a manifest of all files, written out, and renamed last: a folder under its
own name is complete. `check` and `verify` only read, so a read-only share is enough for them.

Exit status 0: all is well; 1: not complete; 75: try again; 78: a person is needed.
Python 3.8+, standard library alone, one file.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # not so at run time: Python 3.8 cannot subscript these
    from collections.abc import Iterator, Sequence

    Json = dict[str, Any]
    Listing = dict[str, "File"]

MANIFEST = "inferfleet-manifest.json"
LOCK = ".writer"
PARTIAL, LEAVING = ".partial", ".leaving"
OURS = re.compile(r"(.+@[0-9a-f]{40})(\.partial|\.leaving)?")
GIB = 2**30
BLOCK = 4 * 2**20  # bytes
LOOK_SECONDS = 10  # between two looks at how far a download has come
TRY_AGAIN, NEEDS_A_PERSON = 75, 78  # EX_TEMPFAIL and EX_CONFIG of sysexits.h


class Failed(Exception):
    """What may work when tried again."""

    status = TRY_AGAIN


class Refused(Failed):
    """What will not work until somebody changes something."""

    status = NEEDS_A_PERSON


class File(NamedTuple):
    """What a source says of a file: bytes, and a digest by `kind`: sha256, or git's blob."""

    size: int
    kind: str
    digest: str


def say(text: str) -> None:
    print(text, flush=True)


# What is complete


def manifest_of(folder: Path) -> Json:
    """The manifest; empty when there is none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def faults(folder: Path) -> Iterator[str]:
    """Why a folder is no complete model; nothing when it is one. Only reads names and sizes."""
    if folder.name.endswith((PARTIAL, LEAVING)) or not folder.is_dir():
        yield "is not complete: it is fetched under another name until it is"
        return
    manifest = manifest_of(folder)
    if not manifest:
        yield f"has no {MANIFEST}: nobody knows what belongs to it"
    for name, file in manifest.get("files", {}).items():
        size = size_of(folder / name)
        if size != file["size"]:
            yield f"{name} has {size} of {file['size']} bytes" if size >= 0 else f"{name} is gone"


def damage(folder: Path) -> Iterator[str]:
    """What `faults` finds, or else every file whose content is not as it was fetched."""
    found = list(faults(folder))
    yield from found
    for name, file in {} if found else manifest_of(folder)["files"].items():
        if hashed(folder / name)["sha256"] != file["sha256"]:
            yield f"{name} is damaged: remove the folder, it is fetched anew"


def size_of(path: Path) -> int:
    """Bytes of a regular file; -1 when there is none."""
    return path.stat().st_size if path.is_file() else -1


def hashed(path: Path) -> dict[str, str]:
    """A file's digests, SHA-256 and git's, hex."""
    sha256, git = hashlib.sha256(), hashlib.sha1()  # noqa: S324 - git's own names of contents
    git.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            sha256.update(block)
            git.update(block)
    return {"sha256": sha256.hexdigest(), "git": git.hexdigest()}


# One writer


def me() -> Json:
    """Who holds a lock: enough to see later whether that process still lives."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": boot, "pid": pid, "started": started(pid)}


def started(pid: int) -> str:
    """When a process started, in ticks since boot; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").split()[-31]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def lives(holder: Json) -> bool:
    """Whether a lock's holder may still write; a process of another host is trusted to."""
    mine = me()
    if holder.get("host") != mine["host"]:
        return bool(holder)
    return bool(holder["boot"] == mine["boot"] and holder["started"] == started(holder["pid"]))


@contextlib.contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Hold the folder; a file made with O_EXCL, since flock over NFS may let everybody in."""
    path = target / LOCK
    for _ in range(2):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            release_dead(path)
            continue
        os.write(fd, json.dumps(me()).encode())
        os.close(fd)
        break
    else:
        raise Failed(f"{target} got another writer at the same moment")
    try:
        yield
    finally:
        path.unlink()


def release_dead(path: Path) -> None:
    """Take away the lock of a process that is gone; Failed when its holder lives."""
    text = path.read_text(encoding="utf-8")
    if not text:  # its holder is just writing it, or was cut off there
        time.sleep(1)
        text = path.read_text(encoding="utf-8")
    holder = json.loads(text or "{}")
    if lives(holder):
        who = f"process {holder['pid']} of {holder['host']}"
        raise Failed(f"{path.parent} is being written by {who}; if that is gone, remove {path}")
    say(f"taking over from a writer that is gone: {text or 'unknown'}")
    aside = path.with_name(f"{LOCK}-{os.getpid()}")
    path.rename(aside)  # only one of two that come here at once gets it
    aside.unlink()


# Sources


class Hub:
    """The Hugging Face hub or a mirror of it; downloads are made by its own command line."""

    def __init__(self, config: Json) -> None:
        self.endpoint: str = config["endpoint"].rstrip("/")
        self.exclude: list[str] = config["exclude"]
        self.command: str = config["command"]
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        token = Path(credentials or "/nonexistent", "token")
        self.token = token if token.is_file() else None

    def listing(self, model: Json) -> Listing:
        """What belongs to the model's revision, from the hub's API with sizes and digests."""
        repository, revision = model["repository"], model["revision"]
        place = f"{self.endpoint}/api/models/{repository}/revision/{revision}?blobs=true"
        request = urllib.request.Request(place)  # noqa: S310 - the schema lets http(s) through only
        if self.token:
            token = self.token.read_text(encoding="ascii").strip()
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        files = {}
        for entry in asked(request, repository)["siblings"]:
            name = entry["rfilename"]
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude):
                continue
            digest = entry.get("lfs") or {}
            kind, value = ("sha256", digest["sha256"]) if digest else ("git", entry["blobId"])
            files[name] = File(entry["size"], kind, value)
        return files

    def fill(self, model: Json, partial: Path, files: Listing) -> None:
        """Let `hf download` do it: what is there already is not fetched again."""
        for left in partial.glob(".cache/huggingface/**/*"):
            if left.name.endswith((".incomplete", ".lock")):  # of a download that was cut short
                left.unlink()
        argv = [self.command, "download", model["repository"], *sorted(files)]
        argv += ["--revision", model["revision"], "--local-dir", str(partial)]
        own = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if self.token:
            own["HF_TOKEN_PATH"] = str(self.token)
        with subprocess.Popen(argv, env={**os.environ, **own}) as process:
            status = watched(process, model["folder"], partial, total(files))
        if status:
            raise Failed(f"{model['repository']}: hf download ended with status {status}")


def watched(process: subprocess.Popen[bytes], title: str, partial: Path, size: int) -> int:
    """Its exit status; meanwhile, say how much of the `size` bytes it fetches is there."""
    seen = ""
    while True:
        try:
            return process.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            line = f"{title}: {min(100, 100 * used(partial) // max(1, size))} % of {gib(size)} GiB"
        if line != seen:
            say(line)
        seen = line


def used(folder: Path) -> int:
    """Bytes of all files below a folder, some of which may just be renamed."""
    found = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += Path(top, name).lstat().st_size
    return found


def asked(request: urllib.request.Request, repository: str) -> Json:
    """The API's answer as JSON; Refused when asking again would not help."""
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            found: Json = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = f"{repository}: {request.full_url} answers {error.code}"
        if error.code in (401, 403):
            raise Refused(f"{said}: it needs a token whose owner accepted its terms") from None
        if error.code == 404:
            raise Refused(f"{said}: no such repository or revision") from None
        raise Failed(said) from None
    except (OSError, ValueError) as error:
        raise Failed(f"{repository}: {request.full_url}: {error}") from None
    return found


class Directory:
    """Complete models in another folder: the share, or a disk carried into an air gap."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def listing(self, model: Json) -> Listing:
        source = self.folder / model["folder"]
        found = list(faults(source))
        if found:
            raise Failed(f"{source} {found[0]}")
        files = manifest_of(source)["files"]
        return {n: File(f["size"], "sha256", f["sha256"]) for n, f in files.items()}

    def fill(self, model: Json, partial: Path, files: Listing) -> None:
        """Copy file by file; what has its final name was copied whole."""
        for name, file in sorted(files.items()):
            wanted = partial / name
            if size_of(wanted) == file.size:
                continue
            wanted.parent.mkdir(parents=True, exist_ok=True)
            part = wanted.with_name(f"{wanted.name}.part")
            shutil.copyfile(self.folder / model["folder"] / name, part)
            part.rename(wanted)
            say(f"{model['folder']}: {name} ({gib(file.size)} GiB)")


# Fetching


def fetch(config: Json) -> None:
    """Make every wanted model complete. Raises Failed, and leaves what can be gone on with."""
    target = Path(config["target"])
    given = config["source"]
    source = Directory(given["directory"]) if "directory" in given else Hub(given)
    with only_writer(target):
        if config["prune"]:
            prune(target, {model["folder"] for model in config["models"]})
        wanted = [model for model in config["models"] if set_back(target / model["folder"])]
        listings = [(model, checked(source.listing(model), model)) for model in wanted]
        refuse_too_much(target, listings, config["reserve_gib"])
        for model, files in listings:
            say(f"{model['folder']}: {len(files)} files, {gib(total(files))} GiB")
            partial = target / (model["folder"] + PARTIAL)
            partial.mkdir(mode=0o755, exist_ok=True)
            source.fill(model, partial, files)
            complete(model, partial, target / model["folder"], files)
            say(f"{model['folder']}: complete")


def set_back(final: Path) -> bool:
    """Whether a model is to be fetched; a damaged one goes on from what is there of it."""
    if not list(faults(final)):
        return False
    partial = final.with_name(final.name + PARTIAL)
    if final.exists() and not partial.exists():
        final.rename(partial)
    elif final.exists():
        shutil.rmtree(final)
    return True


def checked(files: Listing, model: Json) -> Listing:
    """The listing, if every name stays inside the model's folder and there is anything at all."""
    for name in files:
        if name.startswith(("/", "-")) or ".." in name.split("/") or name == MANIFEST:
            raise Refused(f"{model['folder']}: a file cannot be called {name!r}")
    if not files:
        raise Refused(f"{model['folder']}: nothing belongs to it (all excluded?)")
    return files


def refuse_too_much(target: Path, listings: Sequence[tuple[Json, Listing]], reserve: float) -> None:
    """Check the disk before the first byte: all of it has to fit, and `reserve` GiB stay free."""
    missing = 0
    for model, files in listings:
        partial = target / (model["folder"] + PARTIAL)
        missing += sum(f.size for name, f in files.items() if size_of(partial / name) != f.size)
    free = shutil.disk_usage(target).free
    if missing and missing + reserve * GIB > free:
        names = ", ".join(model["folder"] for model, _ in listings)
        raise Refused(
            f"{target} has {gib(free)} GiB free; {names}: {gib(missing)} GiB to fetch, and "
            f"{reserve:g} GiB are to stay free"
        )


def complete(model: Json, partial: Path, final: Path, files: Listing) -> None:
    """Compare all files with the listing, write the manifest, rename. Failed when one differs."""
    entries, wrong = {}, []
    for name, file in sorted(files.items()):
        digests = hashed(partial / name) if size_of(partial / name) == file.size else {}
        if digests.get(file.kind) != file.digest:
            wrong.append(name)
            with contextlib.suppress(FileNotFoundError):
                (partial / name).unlink()
            continue
        entries[name] = {"size": file.size, "sha256": digests["sha256"]}
    if wrong:
        raise Failed(f"{final.name}: not as the source says, so removed: {', '.join(wrong)}")
    strip(partial, set(entries))
    seal(partial, model["name"], model["revision"], entries)
    os.sync()  # contents before the name that vouches for them
    partial.rename(final)
    os.sync()


def strip(folder: Path, names: set[str]) -> None:
    """Remove what is no part of the model: the downloader's notes and locks, older files."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for path in folder.rglob("*"):
        if not path.is_dir() and str(path.relative_to(folder)) not in names:
            path.unlink()


def seal(folder: Path, model: str, revision: str, files: Json) -> None:
    manifest = {"model": model, "revision": revision, "files": files}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def seal_by_hand(folder: Path, model: str, revision: str) -> None:
    """The manifest of a folder that is trusted as it is; for disks carried into an air gap."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = str(path.relative_to(folder))
            files[name] = {"size": path.stat().st_size, "sha256": hashed(path)["sha256"]}
    seal(folder, model, revision, files)


def total(files: Listing) -> int:
    return sum(file.size for file in files.values())


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


# Removing


def prune(target: Path, wanted: set[str]) -> None:
    """Remove models that no deployment uses, unless a process still reads them."""
    for folder in sorted(target.iterdir()):
        ours = OURS.fullmatch(folder.name)
        if ours is None or (ours[1] in wanted and ours[2] != LEAVING):
            continue
        name = ours[1]
        if read_by(name):
            say(f"{name}: no deployment uses it, but a process still does; kept")
            continue
        leaving = folder.with_name(name + LEAVING)
        if folder != leaving:  # what is removed half is never taken for complete
            shutil.rmtree(leaving, ignore_errors=True)
            folder.rename(leaving)
        shutil.rmtree(leaving)
        say(f"{name}: no deployment uses it; removed")


def read_by(name: str) -> bool:
    """Whether a process was told of this model, maps it or has it open, in containers too."""
    wanted = name.encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (process / "cmdline").read_bytes():
                return True
        with contextlib.suppress(OSError):  # only root may look into others' processes
            if wanted in (process / "maps").read_bytes():
                return True
            if any(name in str(fd.readlink()) for fd in (process / "fd").iterdir()):
                return True
    return False


# The command line


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    verbs = top.add_subparsers(dest="verb", required=True)
    verbs.add_parser("fetch").add_argument("config", type=Path)
    check = verbs.add_parser("check")
    check.add_argument("--wait", type=float, default=0, metavar="SECONDS")
    check.add_argument("folders", type=Path, nargs="+")
    verbs.add_parser("verify").add_argument("folders", type=Path, nargs="+")
    sealing = verbs.add_parser("seal")
    sealing.add_argument("folder", type=Path)
    sealing.add_argument("model")
    sealing.add_argument("revision")
    return top


def judged(folders: Sequence[Path], deep: bool, wait: float) -> int:
    """0 when all folders are complete, if need be after waiting `wait` seconds; else 1."""
    end = time.monotonic() + wait
    while True:
        found = [line for folder in folders for line in judgement(folder, deep)]
        if not found or time.monotonic() >= end:
            break
        time.sleep(min(2, wait))
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


def judgement(folder: Path, deep: bool) -> list[str]:
    """What is wrong with a folder; a share whose server is away may come back while one waits."""
    try:
        return [f"{folder} {fault}" for fault in (damage if deep else faults)(folder)]
    except OSError as error:
        return [f"{folder} cannot be read: {error.strerror}"]


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    os.umask(0o022)  # engines of other users, and root squashed to nobody, read it
    try:
        if given.verb == "fetch":
            fetch(json.loads(given.config.read_text(encoding="utf-8")))
        elif given.verb == "seal":
            seal_by_hand(given.folder, given.model, given.revision)
        else:
            return judged(given.folders, given.verb == "verify", getattr(given, "wait", 0))
    except Failed as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"{error.filename or given.verb}: {error.strerror or error}", file=sys.stderr)
        return TRY_AGAIN
    return 0


if __name__ == "__main__":
    sys.exit(main())
