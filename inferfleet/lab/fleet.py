"""A project folder for hosts made on this machine: the example inventory, with its own hosts.

What cannot come from the example is made here: host entries, keys for clients and engines, and a
certificate for the balancers. Everything else is what a user would provision.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from inferfleet.roles import shipped

PACKAGED = (
    "base",
    "docker",
    "gpu_exporter",
    "model_cache",
    "monitoring",
    "node_exporter",
    "nvidia",
)
LABS = Path("labs")


@dataclass(frozen=True, slots=True)
class Made:
    """A host made for a rehearsal, and how to reach it."""

    name: str
    address: str
    port: int
    user: str
    become: str
    fingerprints: tuple[str, ...]


def names(count: int) -> list[str]:
    """GPU servers and, from two hosts on, a balancer; from five on, two."""
    balancers = 0 if count < 2 else 1 if count < 5 else 2
    servers = [f"gpu-{n:02}" for n in range(1, count - balancers + 1)]
    return [*servers, *(f"lb-{n:02}" for n in range(1, balancers + 1))]


def place(name: str) -> Path:
    """Where a lab's project goes: not below build/, where a phase of that name is rendered to."""
    LABS.mkdir(exist_ok=True)
    (LABS / ".gitignore").write_text("*\n", encoding="ascii")  # keys of its hosts lie there
    return LABS / name


def make(folder: Path, hosts: Sequence[Made], key: Path, wheels: Path | None = None) -> Path:
    """Write the project to `folder`, replacing an earlier one; returns its inventory's folder.

    Gateways come from a folder of `wheels`, as hosts made here reach no package index; without
    one, the balancers stand before the engines.
    """
    shutil.rmtree(folder, ignore_errors=True)
    inventory = folder / "inventory"
    shutil.copytree(shipped("inventory"), inventory)
    _write_hosts(inventory / "hosts.yml", hosts, key, bool(wheels))
    own = inventory / "secrets"
    own.mkdir(mode=0o700)
    for source in inventory.rglob("*.yml"):
        text = source.read_text(encoding="utf-8")
        text = _without_packages(_keys_from_files(text, own))
        text = text.replace("workstation", hosts[0].name)  # or it would be this very machine
        text = _with_wheels(text, wheels) if wheels else _without_gateways(text)
        source.write_text(text, encoding="utf-8")
    _make_certificate(own, [host.address for host in hosts])
    return inventory


def _write_hosts(path: Path, hosts: Sequence[Made], key: Path, gateways: bool) -> None:
    """The example's own hosts give way; the groups stay."""
    shared = gateways and not any(host.name.startswith("gw") for host in hosts)
    text = path.read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    document["groups"]["all"] = {"key": str(key)}
    document["hosts"] = {}
    for host in hosts:
        document["hosts"][host.name] = {
            "address": host.address,
            "port": host.port,
            "user": host.user,
            "become": host.become,
            "host_keys": list(host.fingerprints),
            "groups": _groups(host.name, alone=len(hosts) == 1, shared=shared),
            **({"gpus": [{"model": "L40S", "count": 4}]} if "gpu" in host.name else {}),
        }
    header = text.splitlines()[0]
    path.write_text(header + "\n" + yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def _groups(name: str, *, alone: bool, shared: bool) -> list[str]:
    """Gateways without hosts of their own share those of the balancers."""
    before = ["balancers", "gateways"] if shared else ["balancers"]
    if name.startswith("lb"):
        return before
    if name.startswith("gw"):
        return ["gateways"]
    return ["gpu-servers", *(["pilot"] if name == "gpu-01" else []), *(before if alone else [])]


def _keys_from_files(text: str, folder: Path) -> str:
    """Keys that the example takes from the environment are made up, and read from files."""

    def file(found: re.Match[str]) -> str:
        path = folder / f"{found[1].lower()}.key"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(24) + "\n", encoding="ascii")
        return f"!file secrets/{path.name}"

    return re.sub(r"!env INFERFLEET_([A-Z]+)_KEY", file, text)


def _without_packages(text: str) -> str:
    """Roles that install packages give way: hosts made here reach no package source."""
    return re.sub(rf"^ +({'|'.join(PACKAGED)}):.*\n( {{8,}}.*\n)*", "", text, flags=re.MULTILINE)


def _with_wheels(text: str, wheels: Path) -> str:
    return re.sub(r"^( +)gateway:.*\n", rf"\g<0>\1  wheels: {wheels}\n", text, flags=re.MULTILINE)


def _without_gateways(text: str) -> str:
    """The balancer, which stands right before the gateway in the file, gets its clients' keys."""
    text = re.sub(r"^ +gateway:.*\n +hosts: \[gateways\]\n", "", text, flags=re.MULTILINE)
    return text.replace("gateways, balancers]", "balancers]")


def _make_certificate(folder: Path, addresses: Sequence[str]) -> None:
    """A self-signed certificate for the addresses, as tls.crt and tls.key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "llm.example.com")])
    now = datetime.datetime.now(datetime.UTC)
    known: list[x509.GeneralName] = [x509.DNSName("llm.example.com"), x509.DNSName("localhost")]
    known += [x509.IPAddress(ipaddress.ip_address(a)) for a in sorted(set(addresses))]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(known), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "tls.key").touch(mode=0o600)
    (folder / "tls.key").write_bytes(private)
    (folder / "tls.crt").touch(mode=0o600)  # as it is referred to, it counts as a secret too
    (folder / "tls.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
