"""The question of what a host has, asked of a POSIX shell and coreutils, and how it answers."""

from __future__ import annotations

import base64
import json
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from inferfleet.errors import ApplyError
from inferfleet.model import Bundle, Ensure, FileState, Snapshot, sh

MARK = "inferfleet probe 1"
END = "inferfleet end"

# Braces keep a script that was cut short from running at all. Under another root nothing is run
# and nobody is chowned, so neither ensures nor owners are looked at.
_PROBE = r"""{
r=${INFERFLEET_ROOT:-} s=./var/lib/inferfleet PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
echo; echo '%(mark)s'
cd "$r/"
format='path %%f\t%%U\t%%G\t%%n\n'
[ -z "$r" ] || format='path %%f\t\t\t%%n\n'
set -- %(paths)s
if [ $# -gt 0 ]; then
  stat --printf "$format" -- "$@" 2>/dev/null
  for p do
    shift
    if [ -f "$p" ] && [ ! -L "$p" ]; then set -- "$@" "$p"
    elif [ ! -e "$p" ] && [ ! -L "$p" ]; then printf 'absent %%s\n' "$p"
    fi
  done
  [ $# -eq 0 ] || sha256sum -- "$@" 2>/dev/null
fi
if [ -z "$r" ] || [ -n "${INFERFLEET_RUN:-}" ]; then
  limit=
  ! command -v timeout >/dev/null || limit='timeout -k 5 30'
  cd /
%(ensures)s
  cd "$r/"
fi
for f in current.json owed lock; do
  if [ -s $s/$f ]; then printf '%%s ' $f; cat $s/$f; echo; fi
done
if [ -s $s/lock ] && ! flock -n -s $s/lock true </dev/null 2>/dev/null; then echo held; fi
[ ! -e $s/transaction ] || echo interrupted
if p=$(command -v python3); then
  p=$(readlink -f "$p")
  case $p in *python3.[0-9]*) ;; *) p=$("$p" -V 2>&1 </dev/null) ;; esac
  printf 'python %%s\n' "$p"
fi
echo '%(end)s'
}
"""


def question(bundle: Bundle) -> bytes:
    """The script that asks a host for all that `answer` reads. It changes nothing there."""
    paths = sh(*("." + artefact.path for artefact in bundle.artefacts))
    ensures = "\n".join(_tested(*numbered) for numbered in enumerate(bundle.ensures))
    script = _PROBE % {"mark": MARK, "end": END, "paths": paths, "ensures": ensures}
    return framed("sh", script.encode("utf-8", "surrogateescape"))


def _tested(index: int, ensure: Ensure) -> str:
    asked = sh("sh", "-c", ensure.test)
    return f"  $limit {asked} </dev/null >/dev/null 2>&1 || echo 'failing {index}'"


def framed(word: str, content: bytes) -> bytes:
    """A piece as the bootstrap shell reads it."""
    return b"%s %d\n%s" % (word.encode(), len(content), content)


def answer(host: str, lines: Iterable[bytes]) -> Snapshot:
    """What a host has, read from the lines (without newlines) that `question` makes it print.

    Reads to the end mark and no further. Owners are "" where they do not matter (a host that is
    a folder). `owed` may hold "daemon-reload". Raises ApplyError when anything else is said.
    """
    said: defaultdict[str, list[str]] = defaultdict(list)
    for line in _between_marks(host, lines):
        word, _, rest = line.partition(" ")
        said[word if word in _WORDS else "digest"].append(rest if word in _WORDS else line)
    try:
        return _snapshot(host, said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ApplyError(host, f"it said something unexpected: {error}") from error


_WORDS = frozenset(
    ("path", "absent", "failing", "current.json", "owed", "lock", "held", "interrupted", "python")
)


def _between_marks(host: str, lines: Iterable[bytes]) -> Iterator[str]:
    started = False  # before the mark, a shell's profile may say what it likes
    for raw in lines:
        line = raw.decode("utf-8", "surrogateescape")
        if started and line == END:
            return
        if started:
            yield line
        started = started or line == MARK
    raise ApplyError(host, "the connection ended before the host had said what it has")


def _snapshot(host: str, said: Mapping[str, Sequence[str]]) -> Snapshot:
    current = json.loads(_last(said, "current.json") or "{}")
    return Snapshot(
        host=host,
        files=_files(said),
        failing=frozenset(map(int, said.get("failing", ()))),
        owned={path: tuple(f["restarts"]) for path, f in current.get("files", {}).items()},
        owed=tuple(json.loads(_last(said, "owed") or "{}")),
        interrupted="interrupted" in said,
        phase=current.get("phase", ""),
        lock=_holder(_last(said, "lock")) if "held" in said else "",
        generation=current.get("generation", 0),
        python=_version(_last(said, "python")),
    )


def _last(said: Mapping[str, Sequence[str]], word: str) -> str:
    return said[word][-1] if word in said else ""


def _files(said: Mapping[str, Sequence[str]]) -> dict[str, FileState]:
    digests = dict(map(_digest, said.get("digest", ())))
    there = (_file(line, digests) for line in said.get("path", ()))
    absent = (FileState(path.removeprefix(".")) for path in said.get("absent", ()))
    return {state.path: state for state in (*there, *absent)}


def _file(line: str, digests: Mapping[str, str]) -> FileState:
    bits, owner, group, path = line.split("\t", 3)
    path, kind = path.removeprefix("."), _kind(int(bits, 16))
    digest = digests.get(path, "") if kind == "file" else ""
    return FileState(path, kind, stat.S_IMODE(int(bits, 16)), owner, group, digest)


def _kind(bits: int) -> Literal["file", "symlink", "directory", "other"]:
    if stat.S_ISREG(bits):
        return "file"
    if stat.S_ISLNK(bits):
        return "symlink"
    return "directory" if stat.S_ISDIR(bits) else "other"


def _digest(line: str) -> tuple[str, str]:
    """Path and digest from a line of sha256sum, which escapes odd names and says so."""
    found = re.fullmatch(r"(\\?)([0-9a-f]{64}) [ *]\.(.*)", line)
    if found is None:
        raise ValueError(repr(line[:200]))
    escaped, digest, path = found.groups()
    return re.sub(r"\\(.)", _unescaped, path) if escaped else path, digest


def _unescaped(found: re.Match[str]) -> str:
    return {"r": "\r", "n": "\n"}.get(found[1], found[1])


def _version(text: str) -> str:
    found = re.search(r"(3\.\d+)[^/]*$", text)
    return found[1] if found else ""


def _holder(text: str) -> str:
    try:
        return "{owner} since {time} ({reason})".format(**json.loads(text))
    except (ValueError, KeyError, TypeError):  # it is just being written
        return "another run"


_FETCH = """{
r=${INFERFLEET_ROOT:-}
cd "$r/"
for p in %s; do
  printf 'content %%s\\n' "$p"
  if [ -f "$p" ] && [ ! -L "$p" ]; then base64 -w 0 -- "$p" 2>/dev/null; fi
  echo
done
echo '%s'
}
"""


def fetch(paths: Iterable[str]) -> bytes:
    """Ask for the contents of files, so that a diff can be shown; `fetched` reads the answer."""
    quoted = sh(*("." + path for path in paths))
    return framed("sh", (_FETCH % (quoted, END)).encode("utf-8", "surrogateescape"))


def fetched(host: str, lines: Iterable[bytes]) -> dict[str, bytes]:
    """Contents by path; empty for what is no file. Raises ApplyError when cut short."""
    contents: dict[str, bytes] = {}
    path = ""
    for line in lines:
        if line == END.encode():
            return contents
        if line.startswith(b"content ."):
            path = line.removeprefix(b"content .").decode("utf-8", "surrogateescape")
        else:
            contents[path] = base64.b64decode(line)
    raise ApplyError(host, "the connection ended before the host had shown its files")
