#!/usr/bin/env python3
"""GPU metrics for Prometheus under dcgm-exporter's names, for hosts where that cannot run.

    gpu_exporter.py ADDRESS PORT

What a GPU does not know (ECC of a GeForce, say) is left out. Python 3.8+, with nvidia-ml-py's one
file beside it and the driver's NVML.
"""

from __future__ import annotations

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pynvml as nvml

if TYPE_CHECKING:  # not so at run time: Python 3.8 cannot subscript these
    from collections.abc import Callable, Iterator

MIB = 2**20
UNCORRECTED, VOLATILE = 1, 0  # nvmlMemoryErrorType_t, nvmlEccCounterType_t

LAST_XIDS: dict[str, int] = {}  # by UUID


def say(text: str) -> None:
    print(f"gpu_exporter: {text}", file=sys.stderr, flush=True)


def temperature(gpu: Any) -> int:
    return int(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))


def power(gpu: Any) -> float:
    return float(nvml.nvmlDeviceGetPowerUsage(gpu)) / 1000


def utilization(gpu: Any) -> int:
    return int(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)


def memory(gpu: Any) -> Any:
    """Version 1, which all drivers know; what the driver reserves counts as used."""
    return nvml.nvmlDeviceGetMemoryInfo(gpu)


def clock(gpu: Any) -> int:
    return int(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))


def throttled(gpu: Any) -> int:
    policy = nvml.NVML_PERF_POLICY_THERMAL
    return int(nvml.nvmlDeviceGetViolationStatus(gpu, policy).violationTime)


def xid(gpu: Any) -> int:
    return LAST_XIDS.get(nvml.nvmlDeviceGetUUID(gpu), 0)


def ecc(gpu: Any) -> int:
    return int(nvml.nvmlDeviceGetTotalEccErrors(gpu, UNCORRECTED, VOLATILE))


def remap(gpu: Any) -> int:
    _, _, _, failed = nvml.nvmlDeviceGetRemappedRows(gpu)
    return int(failed)


# name -> Prometheus type, what it says, how to ask a GPU's handle for it
METRICS: dict[str, tuple[str, str, Callable[[Any], float]]] = {
    "GPU_TEMP": ("gauge", "GPU temperature (in C).", temperature),
    "POWER_USAGE": ("gauge", "Power draw (in W).", power),
    "GPU_UTIL": ("gauge", "GPU utilization (in %).", utilization),
    "FB_FREE": ("gauge", "Framebuffer memory free (in MiB).", lambda gpu: memory(gpu).free // MIB),
    "FB_USED": ("gauge", "Framebuffer memory used (in MiB).", lambda gpu: memory(gpu).used // MIB),
    "SM_CLOCK": ("gauge", "SM clock frequency (in MHz).", clock),
    "THERMAL_VIOLATION": ("counter", "Throttling duration due to heat (in ns).", throttled),
    "XID_ERRORS": ("gauge", "Value of the last XID error encountered.", xid),
    "ECC_DBE_VOL_TOTAL": ("counter", "Total number of double-bit volatile ECC errors.", ecc),
    "ROW_REMAP_FAILURE": ("gauge", "Whether remapping of rows has failed.", remap),
}


def labels(index: int, gpu: Any) -> str:
    """Those of dcgm-exporter that identify a GPU."""
    uuid, name = nvml.nvmlDeviceGetUUID(gpu), nvml.nvmlDeviceGetName(gpu)
    return f'gpu="{index}",UUID="{uuid}",modelName="{name}"'


def gpus() -> Iterator[tuple[str, Any]]:
    """Labels and handle of each GPU that still answers; one that fell off the bus does not."""
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(index)
            yield labels(index, gpu), gpu
        except nvml.NVMLError as error:
            say(f"GPU {index}: {error}")


def lines() -> Iterator[str]:
    """The exposition, line by line."""
    found = list(gpus())
    for name, (kind, said, ask) in METRICS.items():
        yield f"# HELP DCGM_FI_DEV_{name} {said}"
        yield f"# TYPE DCGM_FI_DEV_{name} {kind}"
        for label, gpu in found:
            try:
                yield f"DCGM_FI_DEV_{name}{{{label}}} {ask(gpu)}"
            except nvml.NVMLError:
                continue  # this GPU does not know it


def watch() -> None:
    """Remember the last Xid of each GPU for as long as this runs."""
    events = nvml.nvmlEventSetCreate()
    for label, gpu in gpus():
        try:
            nvml.nvmlDeviceRegisterEvents(gpu, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError as error:
            say(f"Xids stay unknown of {label}: {error}")
    while True:
        try:
            event = nvml.nvmlEventSetWait_v2(events, 60_000)
        except nvml.NVMLError_Timeout:
            continue
        LAST_XIDS[nvml.nvmlDeviceGetUUID(event.device)] = int(event.eventData)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Answer /metrics; 503 when NVML fails as a whole."""
        if self.path != "/metrics":
            self.send_error(404)
            return
        try:
            body = "\n".join([*lines(), ""]).encode()
        except nvml.NVMLError as error:
            self.send_error(503, explain=str(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """A scrape is not worth a line."""


class Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], handler: type[Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)


def main() -> int:
    address, port = sys.argv[1], int(sys.argv[2])
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        say(str(error))
        return 1
    threading.Thread(target=watch, daemon=True).start()
    with Server((address, port), Handler) as server:
        say(f"on {address}:{server.server_port}")
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
