"""What roles say often, as pure builders: packages, users, running units, ports that answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from inferfleet.model import Ensure, sh

VERIFY_UNIT = ("systemd-analyze", "verify", "--man=no", "{path}")
VERIFY_COMPOSE = ("docker", "compose", "-f", "{path}", "config", "--quiet")

_INSTALL = """\
set -e
if command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  set -- apt-get install -y --no-install-recommends {name}
  "$@" || {{ apt-get update && "$@"; }}
elif command -v dnf >/dev/null; then
  dnf install -y {name}
else
  echo 'neither apt-get nor dnf is here: install {name} by hand' >&2
  exit 1
fi
"""

_PUT = """\
set -e
put() {
  mkdir -p "${1%/*}"
  printf %s "$2" >"$1.new"
  chmod 644 "$1.new"
  mv "$1.new" "$1"
}"""

_UNTIL = """\
restarts() {{ systemctl show -p NRestarts --value {unit}; }}
before=$(restarts)
until {test}; do
  if systemctl is-failed -q {unit} || [ "$(restarts)" -gt $((before + 2)) ]; then
    journalctl -u {unit} -n 15 --no-pager -o cat >&2
    exit 1
  fi
  sleep 0.5
done
"""


def repository(name: str, source: Mapping[str, Any]) -> Ensure:
    """A package source of one's own: `url`, with `suite` for apt and without for dnf.

    `key` is the text of its public keys, `keyring` a file with them on the host. It is there
    before packages are installed, hence no artefact; it stays when nobody wants it any more.
    """
    written = dict(_source(f"inferfleet-{name}", source))
    sums = "".join(f"{hashlib.sha256(t.encode()).hexdigest()}  {p}\n" for p, t in written.items())
    puts = [f"put {sh(path, text)}" for path, text in written.items()]
    return Ensure(
        f"packages of {name} come from {source['url']}",
        test=f"printf %s {sh(sums)} | sha256sum -c --status",
        run="\n".join((_PUT, *puts, "apt-get update" if "suite" in source else "")),
        before=True,
    )


def _source(name: str, source: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The files of a package source: path, content."""
    apt = "suite" in source
    keyring = source.get("keyring")
    if not keyring:
        keyring = f"/etc/apt/keyrings/{name}.asc" if apt else f"/etc/pki/rpm-gpg/{name}.asc"
        yield keyring, source["key"].strip() + "\n"
    if apt:
        components = " ".join(source.get("components", ()))
        lines = ["Types: deb", f"URIs: {source['url']}", f"Suites: {source['suite']}"]
        lines += [f"Components: {components}"] if components else []
        yield (
            f"/etc/apt/sources.list.d/{name}.sources",
            "\n".join([*lines, f"Signed-By: {keyring}", ""]),
        )
    else:
        lines = [f"[{name}]", f"name={name}", f"baseurl={source['url']}", "gpgcheck=1"]
        yield f"/etc/yum.repos.d/{name}.repo", "\n".join([*lines, f"gpgkey=file://{keyring}", ""])


def packages(title: str, test: str, names: Iterable[str]) -> Ensure:
    """The distribution's packages, known by a `test` of what they bring (apt or dnf)."""
    return Ensure(title, test, _INSTALL.format(name=sh(*names)), timeout=1800, before=True)


def package(name: str, command: str) -> Ensure:
    """The distribution's package `name`, known by the `command` it brings (apt or dnf)."""
    return Ensure(
        f"package {name} is installed",
        test=f"command -v {sh(command)} >/dev/null",
        run=_INSTALL.format(name=sh(name)),
        timeout=600,
        before=True,
    )


def system_user(name: str) -> Ensure:
    """A system user without a shell or a password."""
    return Ensure(
        f"user {name} exists",
        test=f"id -u {sh(name)} >/dev/null",
        run=sh("useradd", "--system", "--user-group", "--no-create-home", name),
        before=True,
    )


def image_present(image: str, tool: str = "docker") -> Ensure:
    """The container image is on the host, before anything that runs it is stopped or started."""
    return Ensure(
        f"image {image} is here",
        test=sh(tool, "image", "inspect", image) + " >/dev/null 2>&1",
        run=sh(tool, "pull", "--quiet", image),
        timeout=3600,
        before=True,
    )


def running(unit: str) -> Ensure:
    """The unit runs now and after a reboot."""
    quoted = sh(unit)
    return Ensure(
        f"{unit} is enabled and running",
        test=f"systemctl is-enabled -q {quoted} && systemctl is-active -q {quoted}",
        run=f"systemctl enable -q {quoted} && systemctl start {quoted}",
        timeout=120,
    )


def answers(unit: str, address: str, port: int, path: str, timeout: int) -> Ensure:
    """The unit's HTTP server answers GET `path` with 200; gives up early when it keeps crashing.

    `timeout` is in seconds and must cover loading the model.
    """
    test = _http_200(address, port, path)
    return Ensure(
        f"{unit.removesuffix('.service')} answers on {address}:{port}{path}",
        test=test,
        run=_UNTIL.format(unit=sh(unit), test=test),
        timeout=timeout,
    )


def listens(unit: str, port: int) -> Ensure:
    """The unit accepts connections on loopback."""
    test = sh("bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}") + " 2>/dev/null"
    return Ensure(
        f"{unit.removesuffix('.service')} listens on port {port}",
        test=test,
        run=_UNTIL.format(unit=sh(unit), test=test),
        timeout=30,
    )


def _http_200(address: str, port: int, path: str) -> str:
    """A test by bash alone: 3 ms, where starting Python costs 40."""
    script = (
        f"exec 3<>/dev/tcp/{address}/{port} && "
        f"printf 'GET {path} HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n' >&3 && "
        'read -r -t 5 _ code _ <&3 && [ "$code" = 200 ]'
    )
    return sh("bash", "-c", script) + " 2>/dev/null"
