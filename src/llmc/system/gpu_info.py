"""The state of a GPU while it trains: load, clocks, power, temperature. NVIDIA's management library (NVML) tells it, as in llm.c."""

from __future__ import annotations

import os
from typing import Any

from llmc import _llmc

# Bits of NVML's reasons for lower clocks (nvmlClocksEventReason...), under the names that llm.c prints.
_POWER = 0x4 | 0x80
_THERMAL = 0x20 | 0x40


class GpuInfo:
    """Reads the state of one CUDA device.

    Args:
        cuda_index: the number of the device, as CUDA counts.

    Raises:
        ImportError: if the package nvidia-ml-py is missing.
        llmc.Error: if NVML does not answer.
    """

    def __init__(self, cuda_index: int) -> None:
        try:
            import pynvml
        except ImportError as e:
            raise ImportError("--gpu-info-every needs a package: pip install nvidia-ml-py") from e
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByIndex(_physical_index(cuda_index))
        except pynvml.NVMLError as e:
            raise _llmc.Error(f"NVIDIA's management library does not answer: {e}") from e

    def line(self) -> str:
        """Return the line that llm.c prints, with '-' for what the card does not report, as often for its fan."""
        n, d = self._nvml, self._device
        load = self._ask(n.nvmlDeviceGetUtilizationRates, d)
        fan = self._ask(n.nvmlDeviceGetFanSpeed, d)
        clock = self._ask(n.nvmlDeviceGetClockInfo, d, n.NVML_CLOCK_SM)
        top_clock = self._ask(n.nvmlDeviceGetMaxClockInfo, d, n.NVML_CLOCK_SM)
        power, limit = self._ask(n.nvmlDeviceGetPowerUsage, d), self._ask(n.nvmlDeviceGetPowerManagementLimit, d)
        heat = self._ask(n.nvmlDeviceGetTemperature, d, n.NVML_TEMPERATURE_GPU)
        top_heat = self._ask(n.nvmlDeviceGetTemperatureThreshold, d, n.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
        reasons = self._ask(n.nvmlDeviceGetCurrentClocksThrottleReasons, d) or 0
        cap = (
            "power cap"
            if reasons & _POWER
            else "thermal cap"
            if reasons & _THERMAL
            else "other cap"
            if reasons & ~1
            else "no cap"
        )

        def shown(value: Any, scale: float = 1) -> str:
            return "-" if value is None else f"{value / scale:.0f}"

        return (
            f"compute {shown(load and load.gpu)}% | memory: {shown(load and load.memory)}% | fan: {shown(fan)}% | {shown(clock)} MHz / "
            f"{shown(top_clock)} MHz | {shown(power, 1000)} W / {shown(limit, 1000)} W | {shown(heat)}°C / {shown(top_heat)}°C | {cap}"
        )

    def _ask(self, function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except self._nvml.NVMLError:
            return None


def _physical_index(cuda_index: int) -> int:
    """Return NVML's number of a CUDA device: NVML counts all GPUs, CUDA only those of CUDA_VISIBLE_DEVICES."""
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    if cuda_index < len(visible) and visible[cuda_index].isdigit():
        return int(visible[cuda_index])
    return cuda_index
