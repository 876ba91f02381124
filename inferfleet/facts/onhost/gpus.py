"""GPUs by NVML, through nvidia-ml-py, whose one file travels along; else by `nvidia-smi`."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from typing import Any

from inferfleet.facts.onhost.processes import process, quietly, run

BINDING = ""  # the source of pynvml.py; set by who sends this
LINKS = 18  # the most NVLinks a GPU has (H100 and later)
_FIELDS = "index,uuid,name,driver_version,memory.total,memory.free,memory.used,pci.bus_id"
_NEWER_FIELDS = _FIELDS + ",compute_cap,mig.mode.current,ecc.mode.current"


def gpus() -> dict[str, Any]:
    """`gpus` in PCI order, `driver`, `cuda`, `gpu_source`, and `gpu_why` when there are none."""
    try:
        import ctypes

        ctypes.CDLL("libnvidia-ml.so.1")
    except ImportError:
        why = "python3 here has no ctypes"
    except OSError:
        why = "the driver's libnvidia-ml.so.1 is not here"
    else:
        found, why = _by_nvml()
        if found:
            return found
    smi = _by_smi()
    return smi or {"gpus": [], "gpu_why": f"{why}, and nvidia-smi says nothing"}


def _binding() -> Any:
    """nvidia-ml-py; compiled only where there is a driver, as that takes a moment."""
    if BINDING and "pynvml" not in sys.modules:
        module = sys.modules["pynvml"] = types.ModuleType("pynvml")
        exec(compile(BINDING, "pynvml", "exec"), module.__dict__)  # noqa: S102
    import pynvml

    return pynvml


def _by_nvml() -> tuple[dict[str, Any], str]:
    nvml = _binding()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return {}, f"NVML does not start ({error})"
    try:
        return _Nvml(nvml).all(), ""
    except nvml.NVMLError as error:
        return {}, f"NVML fails ({error})"
    finally:
        nvml.nvmlShutdown()


class _Nvml:
    """NVML, with None for what a GPU or a driver does not have: that is normal on GeForce."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml

    def ask(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self.nvml, name)(*args)
        except (self.nvml.NVMLError, AttributeError):
            return None

    def all(self) -> dict[str, Any]:
        cuda = self.ask("nvmlSystemGetCudaDriverVersion_v2") or 0
        return {
            "gpu_source": "nvml",
            "driver": _text(self.ask("nvmlSystemGetDriverVersion")),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
            "gpus": [self.gpu(index) for index in range(self.nvml.nvmlDeviceGetCount())],
        }

    def gpu(self, index: int) -> dict[str, Any]:
        handle = self.ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:  # fallen off the bus: it still counts
            return {"index": index, "name": "a GPU that does not answer"}
        pci = self.ask("nvmlDeviceGetPciInfo", handle)
        ecc = self.ask("nvmlDeviceGetEccMode", handle)
        capability = self.ask("nvmlDeviceGetCudaComputeCapability", handle)
        persistence = self.ask("nvmlDeviceGetPersistenceMode", handle)
        return {
            "index": index,
            "name": _text(self.ask("nvmlDeviceGetName", handle)),
            "uuid": _text(self.ask("nvmlDeviceGetUUID", handle)),
            "pci": _text(pci.busId) if pci else "",
            "capability": list(capability or ()),
            "ecc": None if ecc is None else bool(ecc[0]),
            "ecc_errors": self.ask("nvmlDeviceGetTotalEccErrors", handle, 1, 0) if ecc else None,
            "persistence": None if persistence is None else bool(persistence),
            "nvlinks": self.links(handle),
            "processes": self.processes(handle),
            **self.memory(handle),
            **self.mig(handle),
        }

    def memory(self, handle: Any) -> dict[str, Any]:
        found = self.ask("nvmlDeviceGetMemoryInfo", handle)
        names = {"total": "memory_total", "free": "memory_free", "used": "memory_used"}
        return {own: int(getattr(found, name)) for name, own in names.items()} if found else {}

    def mig(self, handle: Any) -> dict[str, Any]:
        modes = self.ask("nvmlDeviceGetMigMode", handle)
        if modes is None:
            return {"mig": None}
        most = (self.ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0) if modes[0] else 0
        slices = (
            self.ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(most)
        )
        return {
            "mig": bool(modes[0]),
            "mig_pending": modes[0] != modes[1],
            "mig_instances": [self.slice(each) for each in slices if each is not None],
        }

    def slice(self, handle: Any) -> dict[str, Any]:
        name, uuid = self.ask("nvmlDeviceGetName", handle), self.ask("nvmlDeviceGetUUID", handle)
        return {"name": _text(name), "uuid": _text(uuid), **self.memory(handle)}

    def links(self, handle: Any) -> int:
        return sum(self.ask("nvmlDeviceGetNvLinkState", handle, n) or 0 for n in range(LINKS))

    def processes(self, handle: Any) -> list[dict[str, Any]]:
        found: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):
            for one in self.ask(f"nvmlDeviceGet{kind}RunningProcesses_v3", handle) or ():
                found[one.pid] = one.usedGpuMemory
        return [{**process(pid), "memory": memory} for pid, memory in found.items()]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _by_smi() -> dict[str, Any]:
    rows = _query("--query-gpu=" + _NEWER_FIELDS) or _query("--query-gpu=" + _FIELDS)
    if not rows:
        return {}
    holders = _query("--query-compute-apps=gpu_uuid,pid,used_memory")
    cuda = re.search(r"CUDA Version:\s*([0-9.]+)", quietly("nvidia-smi"))
    return {
        "gpu_source": "nvidia-smi",
        "driver": rows[0][3],
        "cuda": cuda.group(1) if cuda else "",
        "gpus": [_row(row, holders) for row in rows],
    }


def _query(fields: str) -> list[list[str]]:
    try:
        text = run("nvidia-smi", fields, "--format=csv,noheader,nounits", timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]


def _row(row: list[str], holders: list[list[str]]) -> dict[str, Any]:
    capability, mig, ecc = (row + [""] * 3)[8:11]
    return {
        "index": int(row[0]),
        "uuid": row[1],
        "name": row[2],
        "memory_total": _mebibytes(row[4]),
        "memory_free": _mebibytes(row[5]),
        "memory_used": _mebibytes(row[6]),
        "pci": row[7],
        "capability": [int(part) for part in capability.split(".") if part.isdigit()],
        "mig": {"Enabled": True, "Disabled": False}.get(mig),
        "ecc": {"Enabled": True, "Disabled": False}.get(ecc),
        "processes": [
            {**process(int(pid)), "memory": _mebibytes(memory)}
            for uuid, pid, memory in holders
            if uuid == row[1]
        ],
    }


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None
