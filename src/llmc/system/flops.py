"""Peak arithmetic rates, for model FLOPs utilisation."""

from __future__ import annotations

from llmc import _llmc

# FLOP per multiprocessor and clock of dense bf16 matmuls with f32 sums, by compute capability. TF32 has half of it.
_TENSOR_RATES = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
# The same for plain f32 arithmetic, without tensor cores.
_PLAIN_RATES = {80: 128, 86: 256}

# TFLOP/s of dense bf16 matmuls, from the cards' data sheets.
_DATA_SHEETS = {
    "NVIDIA A10": 125.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100-PCIE-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.4,  # SXM
    "NVIDIA H800": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA GH200 144G HBM3e": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
}

# Multiprocessors and clock in MHz, by compute capability, of cards whose rate is computed from them: llm.c's list, and the RTX 50
# series.
_CARDS = {
    86: {
        "NVIDIA RTX A2000": (26, 1200),
        "NVIDIA RTX A4000": (48, 1560),
        "NVIDIA RTX A4500": (56, 1650),
        "NVIDIA RTX A5000": (64, 1695),
        "NVIDIA RTX A5500": (80, 1770),
        "NVIDIA RTX A6000": (84, 1800),
        "NVIDIA GeForce RTX 3060": (28, 1777),
        "NVIDIA GeForce RTX 3060 Ti": (38, 1665),
        "NVIDIA GeForce RTX 3070": (46, 1725),
        "NVIDIA GeForce RTX 3070 Ti": (48, 1770),
        "NVIDIA GeForce RTX 3080": (68, 1710),
        "NVIDIA GeForce RTX 3080 Ti": (80, 1665),
        "NVIDIA GeForce RTX 3090": (82, 1695),
        "NVIDIA GeForce RTX 3090 Ti": (84, 1860),
    },
    89: {
        "NVIDIA RTX 2000 Ada Generation": (22, 2130),
        "NVIDIA RTX 4000 Ada Generation": (48, 2175),
        "NVIDIA RTX 4500 Ada Generation": (60, 2580),
        "NVIDIA RTX 5000 Ada Generation": (100, 2550),
        "NVIDIA RTX 5880 Ada Generation": (110, 2460),
        "NVIDIA RTX 6000 Ada Generation": (142, 2505),
        "NVIDIA GeForce RTX 4060": (24, 2460),
        "NVIDIA GeForce RTX 4060 Ti": (34, 2535),
        "NVIDIA GeForce RTX 4070": (46, 2475),
        "NVIDIA GeForce RTX 4070 SUPER": (56, 2475),
        "NVIDIA GeForce RTX 4070 Ti": (60, 2610),
        "NVIDIA GeForce RTX 4070 Ti SUPER": (66, 2610),
        "NVIDIA GeForce RTX 4080": (76, 2505),
        "NVIDIA GeForce RTX 4080 SUPER": (80, 2550),
        "NVIDIA GeForce RTX 4090": (128, 2520),
    },
    120: {
        "NVIDIA GeForce RTX 5060": (30, 2497),
        "NVIDIA GeForce RTX 5060 Ti": (36, 2572),
        "NVIDIA GeForce RTX 5070": (48, 2512),
        "NVIDIA GeForce RTX 5070 Ti": (70, 2452),
        "NVIDIA GeForce RTX 5080": (84, 2617),
        "NVIDIA GeForce RTX 5090": (170, 2407),
    },
}


def peak_flops(backend: _llmc.Backend, dtype: str) -> float | None:
    """Return the FLOP/s that the backend's device can reach at most. The rate of a CPU is measured, which takes 60 ms.

    Args:
        backend: the device.
        dtype: "f32" or "bf16".

    Returns:
        FLOP/s, or None if the GPU is not known.
    """
    info = backend.info()
    if info.name == "cpu":
        return _llmc.cpu_peak_flops(dtype, info.threads)
    return gpu_peak_flops(
        info.description,
        "tf32" if dtype == "f32" and "tf32 on" in info.options else dtype,
        capability=int(info.isa.removeprefix("sm_")),
        multiprocessors=info.multiprocessors,
        clock_hz=info.clock_hz,
    )


def gpu_peak_flops(
    name: str, dtype: str, *, capability: int = 0, multiprocessors: int = 0, clock_hz: float = 0.0
) -> float | None:
    """Return the peak FLOP/s of a GPU, for dense matmuls with f32 sums.

    Args:
        name: what the driver calls the GPU. If it is not in the tables, the rate is computed from the other arguments.
        dtype: "bf16", "tf32" or "f32" (plain f32, without tensor cores).
        capability: the compute capability without the point: 90 for sm_90.
        multiprocessors: their number.
        clock_hz: the highest clock.

    Returns:
        FLOP/s, or None if neither the name nor the other arguments tell it.

    Raises:
        ValueError: if dtype is another.
    """
    if dtype not in ("bf16", "tf32", "f32"):
        raise ValueError(f"dtype is '{dtype}', expected bf16, tf32 or f32")
    if dtype != "f32":
        tera = 1e12 if dtype == "bf16" else 0.5e12  # TF32 has half of bf16's rate
        if name in _DATA_SHEETS:
            return tera * _DATA_SHEETS[name]
        for family, cards in _CARDS.items():
            if name in cards:
                sms, mhz = cards[name]
                return tera * _TENSOR_RATES[family] * sms * mhz * 1e-6
    rates = _PLAIN_RATES if dtype == "f32" else _TENSOR_RATES
    known = [c for c in rates if c <= capability]
    if not (known and multiprocessors > 0 and clock_hz > 0):
        return None
    rate = rates[max(known)] * multiprocessors * clock_hz
    return rate / 2 if dtype == "tf32" else rate
