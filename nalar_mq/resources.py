"""What the machine has, and what of it is used: the figures that workers report beside their calls.

    cpu             cores: used in all since the last look, and there for this process
    memory_gb       used by all, and there
    gpu             devices: the sum of their utilisations, and how many there are
    gpu_memory_gb   of all devices: used, and there

The figures of devices are there if the package `nvidia-ml-py` is, and the driver.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Final, Protocol, cast

import psutil

_GB: Final = 1e9


class _Utilization(Protocol):
    gpu: int


class _Memory(Protocol):
    used: int
    total: int


class _Nvml(Protocol):
    """What is used of `pynvml`."""

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int) -> object: ...  # noqa: N802
    def nvmlDeviceGetUtilizationRates(self, handle: object) -> _Utilization: ...  # noqa: N802
    def nvmlDeviceGetMemoryInfo(self, handle: object) -> _Memory: ...  # noqa: N802


class Machine:
    """The machine this process runs on. What cannot be read is left out."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._nvml, self._devices = _devices()
        psutil.cpu_percent(interval=None)  # the next look is about the time from now on

    def look(self) -> dict[str, tuple[float, float]]:
        """Used and available amounts by name; takes less than a millisecond without devices."""
        memory = psutil.virtual_memory()
        busy = psutil.cpu_percent(interval=None) / 100 * self._cores
        found = {
            "cpu": (round(busy, 2), float(self._cores)),
            "memory_gb": (round((memory.total - memory.available) / _GB, 2), round(memory.total / _GB, 2)),
        }
        if self._nvml is not None and self._devices:
            try:
                found |= _look_at(self._nvml, self._devices)
            except Exception:  # the driver has gone away: nothing is known of its devices from now on
                self._devices = ()
        return found


def _devices() -> tuple[_Nvml | None, Sequence[object]]:
    if find_spec("pynvml") is None:
        return None, ()
    nvml = cast(_Nvml, import_module("pynvml"))
    try:
        nvml.nvmlInit()
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # the package is there and the driver is not; its errors have no class that is there without it
        return None, ()


def _look_at(nvml: _Nvml, devices: Sequence[object]) -> dict[str, tuple[float, float]]:
    memory = [nvml.nvmlDeviceGetMemoryInfo(device) for device in devices]
    busy = sum(nvml.nvmlDeviceGetUtilizationRates(device).gpu for device in devices) / 100
    used, total = sum(each.used for each in memory), sum(each.total for each in memory)
    return {
        "gpu": (round(busy, 2), float(len(devices))),
        "gpu_memory_gb": (round(used / _GB, 2), round(total / _GB, 2)),
    }
