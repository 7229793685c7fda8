"""Peak rates of GPUs: the table against NVIDIA's own figures, and what is computed for cards that are not in it."""

from __future__ import annotations

import pytest

from llmc.system.flops import gpu_peak_flops


@pytest.mark.parametrize(
    "name,tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 988.8),  # as in llm.c, so that MFUs compare
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 5080", 112.6),
    ],
)
def test_table(name, tflops):
    assert gpu_peak_flops(name, "bf16") == pytest.approx(tflops * 1e12, rel=5e-3)
    assert gpu_peak_flops(name, "tf32") == pytest.approx(tflops * 0.5e12, rel=5e-3)


@pytest.mark.parametrize(
    "capability,sms,mhz,tflops",
    [
        (80, 108, 1410, 312),
        (90, 132, 1830, 989.4),
        (100, 148, 1856, 2250),
        (120, 170, 2407, 209.5),
        (103, 148, 1856, 2250),
    ],
)
def test_unknown_cards_are_computed(capability, sms, mhz, tflops):
    card = {"capability": capability, "multiprocessors": sms, "clock_hz": mhz * 1e6}
    assert gpu_peak_flops("NVIDIA New", "bf16", **card) == pytest.approx(tflops * 1e12, rel=5e-3)
    assert gpu_peak_flops("NVIDIA New", "tf32", **card) == pytest.approx(tflops * 0.5e12, rel=5e-3)


def test_plain_f32_uses_no_tensor_cores():
    a100 = gpu_peak_flops("NVIDIA A100-SXM4-80GB", "f32", capability=80, multiprocessors=108, clock_hz=1.41e9)
    assert a100 == pytest.approx(19.5e12, rel=5e-3)
    rtx4090 = gpu_peak_flops("NVIDIA GeForce RTX 4090", "f32", capability=89, multiprocessors=128, clock_hz=2.52e9)
    assert rtx4090 == pytest.approx(82.6e12, rel=5e-3)


def test_a_card_of_which_nothing_is_known_has_no_peak():
    assert gpu_peak_flops("NVIDIA New", "bf16") is None
    assert gpu_peak_flops("NVIDIA Old", "bf16", capability=70, multiprocessors=80, clock_hz=1.5e9) is None
    with pytest.raises(ValueError, match="expected bf16"):
        gpu_peak_flops("NVIDIA H200", "fp64")
