"""What clients are run against: a real gateway over the simulator, behind TLS of a CA of ours."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).parent.parent
SIMULATOR = ROOT / "roles/simulator/simulator.py"
MODEL, KEY = "qwen2.5-coder", "the-key-of-alice"


@dataclass(frozen=True)
class Service:
    """A running gateway: its address in clear and by TLS, and the CA's file."""

    clear: str
    url: str
    ca: Path


@contextlib.contextmanager
def service(folder: Path) -> Iterator[Service]:
    """A gateway that asks for KEY and serves MODEL, by OpenAI's API and Ollama's."""
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_simulator())
        port = stack.enter_context(_gateway(folder, engine))
        ca, chain, key = certificate(folder)
        tls = stack.enter_context(_tls(port, chain, key))
        yield Service(f"http://127.0.0.1:{port}", f"https://127.0.0.1:{tls}", ca)


@contextlib.contextmanager
def _simulator() -> Iterator[int]:
    argv = [sys.executable, str(SIMULATOR), "--port", "0", "--served-model-name", MODEL]
    with _running(subprocess.Popen([*argv, "--token-rate", "1000"], stdout=-1, text=True)) as one:
        assert one.stdout
        yield int(one.stdout.readline().rsplit(":", 1)[1])


@contextlib.contextmanager
def _gateway(folder: Path, engine: int) -> Iterator[int]:
    public, private = _free(), _free()
    keys = folder / "keys.json"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys.write_text(json.dumps({"keys": [{"name": "alice", "sha256": digest}]}))
    keys.chmod(0o640)
    pool = {
        "backend": "vllm",
        "model": MODEL,
        "instances": [{"name": "one", "url": f"http://127.0.0.1:{engine}"}],
    }
    config = {
        "listen": f"127.0.0.1:{public}",
        "private": f"127.0.0.1:{private}",
        "keys": str(keys),
        "log": None,
        "pools": {"one": pool},
        "models": {MODEL: {"pools": {"one": 1}, "context_length": 32768, "tools": True}},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    argv = [sys.executable, "-m", "inferfleet.gateway", "--config", str(path)]
    with _running(subprocess.Popen(argv, cwd=ROOT)) as process:
        _until_healthy(public, process)
        yield public


def _until_healthy(port: int, process: subprocess.Popen[str]) -> None:
    end = datetime.datetime.now() + datetime.timedelta(seconds=60)
    while process.poll() is None and datetime.datetime.now() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        threading.Event().wait(0.05)
    pytest.fail("the gateway does not become healthy")


@contextlib.contextmanager
def _running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout:
            process.stdout.close()


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def certificate(folder: Path) -> tuple[Path, Path, Path]:
    """A CA, a certificate of it for 127.0.0.1, and that one's key, as files."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in ("CA", "service")]
    authority = _signed(names[0], keys[0], names[0], keys[0], None)
    own = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = _signed(names[1], keys[1], names[0], keys[0], own)
    paths = [folder / name for name in ("ca.pem", "tls.crt", "tls.key")]
    paths[0].write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    paths[2].write_bytes(
        keys[1].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths[0], paths[1], paths[2]


def _signed(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    names: x509.SubjectAlternativeName | None,
) -> x509.Certificate:
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    made = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
    )
    made = made.add_extension(names, critical=False) if names else made
    return made.sign(signer, hashes.SHA256())


@contextlib.contextmanager
def _tls(port: int, chain: Path, key: Path) -> Iterator[int]:
    """Ends TLS and passes bytes on to a port, as a balancer does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, context, port), daemon=True).start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, context: ssl.SSLContext, port: int) -> None:
    with contextlib.suppress(OSError):
        while True:
            accepted, _ = listener.accept()
            threading.Thread(target=_relay, args=(accepted, context, port), daemon=True).start()


def _relay(accepted: socket.socket, context: ssl.SSLContext, port: int) -> None:
    server = socket.create_connection(("127.0.0.1", port))
    with contextlib.suppress(OSError), server, context.wrap_socket(accepted, True) as client:
        back = threading.Thread(target=_copy, args=(server, client), daemon=True)
        back.start()
        _copy(client, server)
        back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


@functools.cache
def packages() -> Path:
    """The folder that tests/tools/clients fills; skips where npm or its registry is missing."""
    tool = Path(__file__).parent / "tools" / "clients"
    done = subprocess.run([tool], capture_output=True, text=True, timeout=570, check=False)
    if done.returncode:
        pytest.skip(f"no opencode, Cline and Continue here: {done.stderr[-300:]}")
    return Path(done.stdout.strip())


def alone(home: Path, **more: str) -> dict[str, str]:
    """An environment for programs of others: a home of their own, and no way but to loopback."""
    dead = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, **dead, "NO_PROXY": "127.0.0.1", "HOME": str(home), **more}
