"""What engines call their metrics, release by release; where they have none, what to ask instead.

Read out of the released packages (vllm/v1/metrics/loggers.py). Everything that queries metrics
uses the newest names; what an older release exposes is renamed when it is scraped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rename:
    """A metric of vLLM and the name it had before the release `since`.

    Both are regular expressions' texts as Prometheus reads them: `${1}` is what `old` captured.
    """

    old: str
    new: str
    since: tuple[int, int, int]


VLLM_RENAMES = (
    Rename("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc", (0, 9, 0)),
    Rename(
        "vllm:gpu_prefix_cache_(hits|queries)(_total)?",
        "vllm:prefix_cache_${1}${2}",
        (0, 9, 0),
    ),
    Rename(
        "vllm:time_per_output_token_seconds(_bucket|_sum|_count)",
        "vllm:inter_token_latency_seconds${1}",
        (0, 10, 2),
    ),
)

# Engines without /metrics, and the path that answers 200 while they serve.
SILENT: Mapping[str, str] = {"ollama": "/api/version"}


def vllm_renames(version: str) -> tuple[Rename, ...]:
    """The metrics that vLLM `version` ("0.8.5", "0.10.1.1", ...) has under an older name only."""
    major, minor, patch = (int(part) for part in version.split(".")[:3])
    return tuple(rename for rename in VLLM_RENAMES if (major, minor, patch) < rename.since)
