"""GPUs against the plan: kind and count, driver, compute capability, memory and who holds it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from inferfleet.capacity import (
    CapacityError,
    Prediction,
    Setup,
    gpu,
    predict,
    quantization,
    with_memory,
)
from inferfleet.capacity.engines import parse_release
from inferfleet.facts import drivers
from inferfleet.facts.case import Case, Device, described, devices, gib, orphaned
from inferfleet.facts.document import GpuProcess
from inferfleet.facts.weights import weight_bytes
from inferfleet.model import Finding, Instance

RESERVED = 0.015  # of a GPU's memory, which the driver counts and CUDA does not
_VARIANTS = {"ti", "super", "laptop", "nvl"}  # words that make it another GPU
_SLICE = re.compile(r"[0-9]g\.[0-9]+gb.*")
_BF16 = (8, 0)  # vLLM platforms/cuda.py check_if_supports_dtype


def present(case: Case) -> Iterator[Finding]:
    """GPUs are there at all, as many as the inventory says, and of the kind it says."""
    wanted, found = case.host.gpus, devices(case.facts)
    used = {index for _, instance in case.on_gpus() for index in instance.gpus}
    if not used:
        return
    if not found:
        yield case.error(
            "gpus",
            f"no GPU is visible: {case.facts.gpu_why or 'the driver lists none'}",
            "engines would not start, or fall back to the CPU",
            "install the driver, reboot if it was just updated, and see `nvidia-smi`",
        )
        return
    if missing := sorted(index for index in used if index >= len(found)):
        yield case.error(
            "gpus",
            f"it has {len(found)} GPUs, the inventory says {len(wanted)}",
            f"instances are placed on GPU {missing[0]}, which is not there",
            _rewrite(case),
        )
    elif len(found) != len(wanted):
        yield case.warning(
            "gpus",
            f"it has {len(found)} GPUs, the inventory says {len(wanted)}",
            "placement counts on what the inventory says",
            _rewrite(case),
        )
    for own, device in zip(wanted, found, strict=False):
        if not same_model(own.model, device.name):
            serious = case.error if own.index in used else case.warning
            yield serious(
                "gpus",
                f"GPU {own.index} is {device.name}, the inventory says {own.model}",
                "memory, formats and speed were planned for another GPU",
                _rewrite(case),
            )


def _rewrite(case: Case) -> str:
    return f"correct the inventory: `inferfleet discover --host {case.host.name} --write`"


def same_model(inventory: str, found: str) -> bool:
    """Whether two names are of the same GPU: by the catalogue, else one within the other."""
    try:
        return gpu(inventory).name == gpu(found).name
    except CapacityError:
        ours, theirs = _words(inventory), _words(found)
        telling = {word for word in theirs if word in _VARIANTS or _SLICE.fullmatch(word)}
        return ours - {"mig"} <= theirs and telling <= ours


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+[0-9.]*[a-z]*|[0-9][0-9a-z.+]*", name.lower()))


def driver(case: Case) -> Iterator[Finding]:
    """The driver is new enough for every engine's release."""
    have = drivers.number(case.facts.driver)
    told = set()
    for role, instance in case.on_gpus() if have else ():
        version = str(instance.options.get("version", ""))
        capability = min((d.gpu.capability for d in _own(case, instance)), default=())
        need = drivers.needed(role, version, capability)
        if need is None or (role, version) in told:
            continue
        told.add((role, version))
        if have < need.oldest:
            yield case.error(
                "driver",
                f"driver {case.facts.driver} is too old: {need.because}",
                "CUDA would not initialise, and the engine not start"
                if role != "ollama"
                else "Ollama would fall back to the CPU without a word",
                f"install driver {drivers.shown(need.oldest)} or newer, or an older engine",
            )
        elif have < need.full:
            yield case.warning(
                "driver",
                f"driver {case.facts.driver} is older than CUDA's own: {need.because}",
                "it runs, but kernels compiled on the host may fail",
                f"install driver {drivers.shown(need.full)} or newer",
            )


def capability(case: Case) -> Iterator[Finding]:
    """The GPUs can compute what the dtype and the quantization ask for."""
    for role, instance in case.on_gpus():
        for device in _own(case, instance)[:1]:
            have = device.gpu.capability
            if have:
                for need, what, remedy in _asked(role, instance):
                    if have < need:
                        yield case.error(
                            "capability",
                            f"{instance.name}: {what} needs compute capability "
                            f"{drivers.shown(need)}; {device.name} has {drivers.shown(have)}",
                            "there are no kernels for it: the engine would not start",
                            remedy,
                        )


def _asked(role: str, instance: Instance) -> Iterator[tuple[tuple[int, int], str, str]]:
    """Compute capabilities that an instance asks for, with what asks and what to do instead."""
    options, model = instance.options, instance.deployment.model
    if role == "ollama":
        yield (5, 0), "Ollama", "use another GPU"
        return
    if role == "vllm":
        number = parse_release(str(options.get("version", ""))).number
        if number >= (0, 20):
            yield (7, 5), f"vLLM {options.get('version')}", "use another GPU, or an older vLLM"
    if options.get("dtype") == "bfloat16":
        yield _BF16, "dtype bfloat16", "set `dtype: float16`"
    forced = str(options.get("quantization") or model.quantization or "")
    try:
        yield quantization(forced).capability, f"quantization {forced}", "choose another checkpoint"
    except CapacityError:
        return  # a format that the catalogue does not know is the engine's own business


def memory(case: Case) -> Iterator[Finding]:
    """Every instance finds the memory it will ask for; what our own units hold comes back."""
    for role, instance in case.on_gpus():
        for device in _own(case, instance):
            total, free = device.memory_total, device.memory_free
            if total is None or free is None:
                continue
            strangers = [p for p in device.gpu.processes if not case.ours(p)]
            returned = sum(p.memory or 0 for p in device.gpu.processes if case.ours(p))
            wanted = wanted_bytes(role, instance, total)
            if min(total, free + returned) < wanted - RESERVED * total:
                yield case.error(
                    "memory",
                    f"GPU {device.gpu.index} has {gib(free + returned)} free, "
                    f"{instance.name} takes {gib(wanted)}{_held(strangers)}",
                    "the engine would stop with an out-of-memory error"
                    if role != "ollama"
                    else "Ollama would run layers on the CPU without a word",
                    _freed(strangers) + _less(case, instance, total, free + returned),
                )


def _less(case: Case, instance: Instance, total: int, free: int) -> str:
    """The share of memory with which it would fit what is free, and what the cache then holds."""
    expected = case.predicted.get(instance.name)
    share = (100 * free // total) / 100
    if expected is None or share <= 0:
        return ""
    lower = predict(replace(measured(expected, total), utilization=share))
    if lower.verdict == "does not fit":
        return ""
    return f", or set gpu_memory_utilization: {share}, which keeps {lower.kv_tokens:,} tokens"


def fits(case: Case) -> Iterator[Finding]:
    """The prediction again, with the memory the GPUs really have."""
    for _, instance in case.on_gpus():
        expected = case.predicted.get(instance.name)
        totals = [d.memory_total for d in _own(case, instance) if d.memory_total]
        if expected is None or not totals or expected.verdict == "does not fit":
            continue  # what never fits is refused by `check`
        again = predict(measured(expected, min(totals)))
        if again.verdict == "does not fit":
            yield case.error(
                "capacity",
                f"{instance.name} does not fit: a GPU has {gib(min(totals))}, "
                f"its model has {gib(expected.setup.gpu.memory)} in the catalogue",
                "the engine would stop after loading the weights",
                "lower max_model_len or max_num_seqs, or use the GPUs the inventory names",
            )


def measured(expected: Prediction, total: int) -> Setup:
    """The setup of a prediction on a GPU with so much memory, or the catalogue's if that is less.

    NVML's total is up to 3 % above what CUDA can give, which is what the catalogue holds.
    """
    known = expected.setup.gpu
    return replace(expected.setup, gpu=with_memory(known, min(known.memory, total)))


def _held(strangers: list[GpuProcess]) -> str:
    if not strangers:
        return ""
    return "; held by " + ", ".join(
        described(p) + (f": {gib(p.memory)}" if p.memory else "") for p in strangers[:4]
    )


def _freed(strangers: list[GpuProcess]) -> str:
    if any(map(orphaned, strangers)):
        return "kill what is orphaned: kill " + _pids([p for p in strangers if orphaned(p)])
    if strangers:
        return "stop what holds it, or give the instance another GPU"
    return "lower what the instance takes, or choose a smaller model"


def _pids(processes: list[GpuProcess]) -> str:
    return " ".join(str(process.pid) for process in processes)


def orphans(case: Case) -> Iterator[Finding]:
    """Engine processes whose engine is gone: they hold memory until somebody kills them."""
    used = {d.gpu.index for _, i in case.on_gpus() for d in _own(case, i)}
    if case.rehearsal:
        return
    for gpu_facts in case.facts.gpus:
        for process in filter(orphaned, gpu_facts.processes):
            size = f" of {gib(process.memory)}" if process.memory else ""
            severe = case.error if gpu_facts.index in used else case.warning
            yield severe(
                "orphan",
                f"{described(process)} is orphaned and holds memory{size} on GPU {gpu_facts.index}",
                "its engine is gone: it serves nobody, and the next start fails for lack of memory",
                f"kill {process.pid} (kill -9 if it stays)",
            )


def health(case: Case) -> Iterator[Finding]:
    """GPUs that are there but not well."""
    used = {d.gpu.index for _, i in case.on_gpus() for d in _own(case, i)}
    for one in case.facts.gpus:
        if one.index in used and one.ecc_errors:
            yield case.warning(
                "ecc",
                f"GPU {one.index} counts {one.ecc_errors} uncorrected memory errors",
                "requests on it crash, or answer nonsense",
                "reset the GPU or reboot; replace it if they come back",
            )
        if one.index in used and one.mig_pending:
            yield case.warning(
                "mig",
                f"GPU {one.index} changes its MIG mode at the next reset",
                "after a reboot it is another device than the one planned for",
                "reset the GPU now, or take the change back",
            )


def wanted_bytes(role: str, instance: Instance, total: int) -> float:
    """Memory an instance takes of each of its GPUs: its share for vLLM, else the weights' part."""
    options = instance.options
    if role == "vllm" and not options.get("kv_cache_memory_bytes"):
        share = options.get("gpu_memory_utilization")
        if share is None:
            share = (
                0.92 if parse_release(str(options.get("version", ""))).number >= (0, 20) else 0.9
            )
        return float(share) * total
    return (weight_bytes(instance.deployment.model) or 0) / len(instance.gpus)


def _own(case: Case, instance: Instance) -> list[Device]:
    found = devices(case.facts)
    return [found[index] for index in instance.gpus if index < len(found)]
