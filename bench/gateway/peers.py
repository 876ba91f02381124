"""Who is measured: how each is had, configured and started, with one worker and the same key."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gateway.processes import CACHE, HERE, free_port

ROOT = HERE.parent.parent
KEY = "sk-bench-5d1c77a0e3b94f6c8a21"


class MissingError(Exception):
    """A peer cannot be had on this machine; the text says why."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a peer runs: its folder and port, and the ports of the engines behind it."""

    folder: Path
    port: int
    engines: list[int]

    def written(self, name: str, text: str) -> str:
        """The path of a file of this peer, now holding the text."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o600)
        return str(path)

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.engines]


@dataclass(frozen=True, slots=True)
class Peer:
    """One of those measured; `command` writes its files and gives what starts it."""

    name: str
    command: Callable[[Site], list[str]]
    retries: bool = False  # whether it asks another engine after a reset
    env: dict[str, str] = field(default_factory=dict)


def ours(site: Site) -> list[str]:
    """The gateway: keys, request log and metrics on, as it is deployed."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys = site.written("keys.json", json.dumps({"keys": [{"name": "bench", "sha256": digest}]}))
    instances = [{"name": f"bench-{n}", "url": url} for n, url in enumerate(site.urls)]
    pool = {"backend": "vllm", "model": "bench", "max_outstanding": 4096, "instances": instances}
    config = {
        "listen": f"127.0.0.1:{site.port}",
        "private": f"127.0.0.1:{free_port()}",
        "workers": 1,
        "keys": keys,
        "log": str(site.folder / "requests.log"),
        "drain_timeout": 2,
        "health": {"failures": 3 if len(instances) == 1 else 1_000_000},  # none is to be ejected
        "pools": {"bench": pool},
        "models": {"bench": {"pools": {"bench": 100}}},
    }
    path = site.written("gateway.json", json.dumps(config))
    return [sys.executable, "-m", "inferfleet.gateway", "--config", path]


def installed(name: str, *packages: str) -> Path:
    """The program `name` of a virtual environment in the cache, made at the first call."""
    folder = CACHE / name
    program, stamp = folder / "bin" / name, folder / "packages"
    if not stamp.exists() or stamp.read_text() != " ".join(packages):
        print(f"installing {', '.join(packages)} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "-q", *packages]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode or not program.exists():
            raise MissingError(f"pip install {' '.join(packages)}: {done.stderr.strip()[-200:]}")
        # without bytecode LiteLLM, which imports while it answers, reaches two thirds
        compiling = [str(folder / "bin" / "python"), "-m", "compileall", "-q", str(folder / "lib")]
        subprocess.run(compiling, capture_output=True, check=False)
        stamp.write_text(" ".join(packages))
    return program


# without these each request tries an import that fails, which costs LiteLLM a fifth of its speed
TELEMETRY = ("opentelemetry-sdk", "opentelemetry-exporter-otlp")


def litellm(site: Site) -> list[str]:
    """LiteLLM's proxy with a master key and no database, as quiet as it can be."""
    program = installed("litellm", "litellm[proxy]", *TELEMETRY)
    models = [
        {
            "model_name": "bench",
            "litellm_params": {"model": "hosted_vllm/bench", "api_base": f"{url}/v1"},
        }
        for url in site.urls
    ]
    config = {
        "model_list": models,
        "general_settings": {"master_key": KEY, "disable_spend_logs": True},
        "litellm_settings": {"set_verbose": False, "telemetry": False, "num_retries": 3},
        "router_settings": {"allowed_fails": 1_000_000, "num_retries": 3, "retry_after": 0},
    }
    path = site.written("litellm.yaml", json.dumps(config))  # YAML holds JSON
    where = ["--host", "127.0.0.1", "--port", str(site.port)]
    return [str(program), "--config", path, *where, "--num_workers", "1"]


NGINX = """
{user}worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
    access_log {folder}/access.log; client_max_body_size 64m; client_body_buffer_size 2m;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder}; keepalive_requests 100000000;
    upstream engines {{ {servers} keepalive 1024; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port};
        if ($http_authorization != "Bearer {key}") {{ return 401; }}
        location / {{
            proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off; proxy_read_timeout 600;
            proxy_next_upstream error timeout non_idempotent;
        }}
    }}
}}
"""


def nginx(site: Site) -> list[str]:
    """Plain nginx with an access log and a comparison of the key."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not program:
        raise MissingError("there is no nginx on this machine")
    text = NGINX.format(
        user="user root; " if os.geteuid() == 0 else "",
        folder=site.folder,
        servers=" ".join(f"server 127.0.0.1:{port} max_fails=0;" for port in site.engines),
        port=site.port,
        key=KEY,
    )
    path = site.written("nginx.conf", text)
    return [program, "-p", str(site.folder), "-c", path, "-g", "daemon off;"]


def router(site: Site) -> list[str]:
    """vllm-router: Rust, no keys of its own."""
    program = installed("vllm-router", "vllm-router")
    where = ["--host", "127.0.0.1", "--port", str(site.port)]
    quiet = ["--log-level", "error", "--prometheus-port", str(free_port())]
    steady = ["--policy", "round_robin", "--disable-circuit-breaker"]
    return [str(program), *where, *quiet, *steady, "--worker-urls", *site.urls]


def proxy(kind: str) -> Callable[[Site], list[str]]:
    """One of the minimal proxies."""

    def command(site: Site) -> list[str]:
        script = str(HERE / "proxies.py")
        return [sys.executable, script, kind, str(site.port), site.urls[0], KEY]

    return command


QUIET = {
    "LITELLM_LOG": "ERROR",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
}
PEERS = {
    peer.name: peer
    for peer in (
        Peer("inferfleet", ours, retries=True, env={"PYTHONPATH": str(ROOT)}),
        Peer("litellm", litellm, retries=True, env=QUIET),
        Peer("fastapi-httpx", proxy("httpx")),
        Peer("fastapi-aiohttp", proxy("aiohttp")),
        Peer("vllm-router", router, retries=True),
        Peer("nginx", nginx, retries=True),
    )
}
