"""Say before anything is deployed whether it fits, how many users it carries, what to run instead.

Pure functions over frozen dataclasses; memory in bytes, lengths in tokens. `predict` is the heart:
a `Setup` (model, GPU, engine options) gives a `Prediction`. Whatever makes no sense raises
`CapacityError`, which names the rule.
"""

from inferfleet.capacity.advise import (
    Fit,
    Recommendation,
    Size,
    carried,
    fit,
    next_larger,
    parts,
    recommend,
    recommend_ollama,
    size,
)
from inferfleet.capacity.catalogue import from_folder, model, models
from inferfleet.capacity.config import from_config
from inferfleet.capacity.dimensions import (
    CapacityError,
    Dimensions,
    Experts,
    Latent,
    Recurrent,
)
from inferfleet.capacity.gpus import GIB, GpuSpec, gpu, gpus, slices, with_memory
from inferfleet.capacity.ollama import OllamaPrediction, predict_ollama
from inferfleet.capacity.placement import Layout, Request, Site, Spot, cost, place
from inferfleet.capacity.predict import ONE_SLICE, Memory, Prediction, Setup, correction, predict
from inferfleet.capacity.quantization import Quantization, quantization
from inferfleet.capacity.remedy import Remedy, remedies, smallest_change
from inferfleet.capacity.roofline import Bounds, bounds

__all__ = [
    "GIB",
    "ONE_SLICE",
    "Bounds",
    "CapacityError",
    "Dimensions",
    "Experts",
    "Fit",
    "GpuSpec",
    "Latent",
    "Layout",
    "Memory",
    "OllamaPrediction",
    "Prediction",
    "Quantization",
    "Recommendation",
    "Recurrent",
    "Remedy",
    "Request",
    "Setup",
    "Site",
    "Size",
    "Spot",
    "bounds",
    "carried",
    "correction",
    "cost",
    "fit",
    "from_config",
    "from_folder",
    "gpu",
    "gpus",
    "model",
    "models",
    "next_larger",
    "parts",
    "place",
    "predict",
    "predict_ollama",
    "quantization",
    "recommend",
    "recommend_ollama",
    "remedies",
    "size",
    "slices",
    "smallest_change",
    "with_memory",
]
