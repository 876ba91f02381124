"""Container images without Docker: made from the lab's root file system, served as a registry."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from aptkit import Quiet

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
# a shell and Python, and what they link to
PARTS = ("bin", "lib", "lib64", "usr/bin", "usr/lib", "usr/lib64", "etc/passwd", "etc/ld.so.cache")
WITHOUT = ("usr/lib/systemd", "usr/lib/apt", "usr/lib/*/perl*", "usr/lib/*/gconv", "usr/bin/perl*")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


class Registry(Quiet):
    """The part of a registry's API that pulls ask for; files lie as its paths say."""

    def guess_type(self, path: object) -> str:
        return MANIFEST if "/manifests/" in str(path) else "application/octet-stream"


def image(folder: Path, name: str, tag: str, tree: Path, extra: Mapping[str, str]) -> None:
    """Put the image `name`:`tag` into the registry `folder`; `extra` are programs by path."""
    base = folder / "v2" / name
    for place in ("blobs", "manifests"):
        (base / place).mkdir(parents=True)
    layer = _blob(base, _layer(folder, tree, extra))
    config = {
        "architecture": MACHINES[platform.machine()],
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }
    written = folder / "config"
    written.write_text(json.dumps(config))
    described = _blob(base, written) | {"mediaType": CONFIG}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described}
    content = json.dumps(manifest | {"layers": [layer | {"mediaType": LAYER}]})
    digest = hashlib.sha256(content.encode()).hexdigest()
    for reference in (tag, f"sha256:{digest}"):
        (base / "manifests" / reference).write_text(content)


def _layer(folder: Path, tree: Path, extra: Mapping[str, str]) -> Path:
    """A tar of what a Python program needs, and the programs."""
    own, layer = folder / "own", folder / "layer"
    for path, text in extra.items():
        program = own / path.lstrip("/")
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    parts = [part for part in PARTS if (tree / part).exists()]
    without = [f"--exclude={pattern}" for pattern in WITHOUT]
    argv = ["tar", "-cf", layer, *without, "-C", tree, *parts, "-C", own, "."]
    subprocess.run(argv, check=True)
    shutil.rmtree(own)
    return layer


def _blob(base: Path, content: Path) -> dict[str, object]:
    """Move a file among the blobs; its descriptor."""
    with content.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    size = content.stat().st_size
    content.rename(base / "blobs" / digest)
    return {"digest": digest, "size": size}
