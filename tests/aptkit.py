"""Signed apt repositories for hosts of the lab, and packages made on the spot."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Signer:
    """A key that signs repositories; `home` is GnuPG's folder, its path a short one."""

    home: Path

    @classmethod
    def make(cls, home: Path) -> Signer:
        home.mkdir(mode=0o700)
        signer = cls(home)
        signer._gpg("--passphrase", "", "--quick-generate-key", "packages@example.com", "ed25519")
        return signer

    @property
    def key(self) -> str:
        """The public key in ASCII armour."""
        return self._gpg("--armor", "--export")

    def sign(self, text: str) -> str:
        return self._gpg("--clearsign", stdin=text)

    def close(self) -> None:
        """End the agent that GnuPG left running."""
        subprocess.run(["gpgconf", "--homedir", self.home, "--kill", "all"], check=True)

    def _gpg(self, *words: str, stdin: str = "") -> str:
        argv = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", *words]
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def deb(folder: Path, name: str, version: str, files: Mapping[str, str], **fields: str) -> Path:
    """Build a package below `folder`: files by path, programs mode 0755, and further fields."""
    root = folder / ".building" / f"{name}_{version}"
    for path, text in files.items():
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755 if text.startswith("#!") else 0o644)
    control = {"Package": name, "Version": version, "Architecture": "all", **fields}
    control |= {"Maintainer": "Tests <tests@example.com>", "Description": "a stand-in"}
    lines = "".join(f"{key.replace('_', '-')}: {value}\n" for key, value in control.items())
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(lines)
    built = folder / f"{name}_{version}.deb"
    argv = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", root, built]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(root)
    return built


def publish(folder: Path, signer: Signer) -> None:
    """Make the folder's packages a flat repository, signed: its suite is `/`."""
    packages = "\n".join(map(_stanza, sorted(folder.glob("*.deb")))).encode()
    (folder / "Packages").write_bytes(packages)
    digest = hashlib.sha256(packages).hexdigest()
    release = f"Date: {formatdate()}\nSHA256:\n {digest} {len(packages)} Packages\n"
    (folder / "InRelease").write_text(signer.sign(release))


def _stanza(package: Path) -> str:
    argv = ["dpkg-deb", "--field", str(package)]
    fields = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    size = package.stat().st_size
    return f"{fields}Filename: ./{package.name}\nSize: {size}\nSHA256: {digest}\n"


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder's files; the paths that were asked for are kept in its server."""

    def log_message(self, *_: object) -> None:
        pass

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        asked: list[str] = self.server.asked  # type: ignore[attr-defined]
        asked.append(f"{self.command} {self.path}")


@dataclass(frozen=True, slots=True)
class Served:
    """A folder that is served: where, and what was asked for."""

    url: str
    asked: list[str]


@contextmanager
def served(folder: Path, address: str, handler: type[Quiet] = Quiet) -> Iterator[Served]:
    """Serve a folder by HTTP on a free port of an address of this machine."""
    make = functools.partial(handler, directory=str(folder))
    with ThreadingHTTPServer((address, 0), make) as server:
        asked: list[str] = []
        server.asked = asked  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Served(f"http://{address}:{server.server_port}", asked)
        finally:
            server.shutdown()
            thread.join()
