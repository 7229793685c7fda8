"""The state of a GPU while it trains: load, clocks, power, temperature (llm.c's -lg), through NVIDIA's management library."""

from __future__ import annotations

from typing import Any

# nvmlClocksEventReason bits, by llm.c's three words.
_POWER = 0x4 | 0x80
_THERMAL = 0x20 | 0x40


class GpuInfo:
    """NVML for one CUDA device. ImportError where nvidia-ml-py is missing, llmc.Error where NVML does not answer."""

    def __init__(self, cuda_index: int) -> None:
        try:
            import pynvml
        except ImportError as e:
            raise ImportError("--gpu-info-every needs a package: pip install nvidia-ml-py") from e
        from llmc import _llmc

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByIndex(_physical_index(cuda_index))
        except pynvml.NVMLError as e:
            raise _llmc.Error(f"NVIDIA's management library does not answer: {e}") from e

    def line(self) -> str:
        """llm.c's line; what a card does not report (a fan, often) is shown as '-'."""
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
    """NVML counts all GPUs, CUDA only the visible ones."""
    import os

    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    if cuda_index < len(visible) and visible[cuda_index].isdigit():
        return int(visible[cuda_index])
    return cuda_index
