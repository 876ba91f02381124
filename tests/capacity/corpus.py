"""The published start-ups, as setups and what their engines logged."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from inferfleet.capacity.catalogue import model
from inferfleet.capacity.gpus import GIB, gpu
from inferfleet.capacity.predict import Prediction, Setup, predict


@dataclass(frozen=True)
class Measured:
    """One start-up: what was asked, what was logged (GiB), and the prediction."""

    name: str
    setup: Setup
    log: dict[str, Any]
    source: str

    @property
    def counted(self) -> bool:
        return "held_out" not in self.log

    @property
    def prediction(self) -> Prediction:
        return predict(self.setup)

    @property
    def pool(self) -> float | None:
        """GiB of the pool: tokens x bytes a token where tokens were logged, which is finer."""
        if "kv_tokens" in self.log:
            return self.log["kv_tokens"] * self.prediction.kv_token_bytes / GIB
        return self.log.get("kv_gib")


@cache
def corpus() -> tuple[Measured, ...]:
    rows = yaml.safe_load((Path(__file__).parent / "measurements.yaml").read_text())
    return tuple(
        Measured(name, _setup(row["setup"]), row["log"], row["source"])
        for name, row in rows.items()
    )


def _setup(row: dict[str, Any]) -> Setup:
    return Setup(
        model(row["model"]),
        gpu(row["gpu"], round(row["gpu_gib"] * GIB)),
        quantization=row["weights"],
        context=row.get("context"),
        sequences=row.get("sequences"),
        batched_tokens=row.get("batched_tokens"),
        utilization=row["utilization"],
        tensor_parallel=row.get("tp", 1),
        eager=row.get("eager", False),
        version=row["version"],
        generation=row["generation"],
        usage=row.get("usage", "serve"),
    )
