"""Published peaks of GPUs: the ceilings that models and measurements of this project are held to.

Dense rates (no sparsity), with FP32 accumulation, as training uses. GeForce cards multiply FP8 and
bfloat16 with FP32 accumulation at half the rate that their data sheets print first. The sources are
the vendor's documents; the numbers were written down from memory of them, not looked up again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp8", "bf16", "fp32"]


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: as the tables print it.
        capability: CUDA compute capability, (major, minor).
        fp8_flops, bf16_flops: FLOP/s of the tensor cores, dense, FP32 accumulation.
        fp32_flops: FLOP/s of the ordinary cores.
        bandwidth: of the device memory, bytes/s.
        memory: nominal size of the device memory, bytes; a driver leaves a little less.
        source: where the figures are published.
    """

    name: str
    capability: tuple[int, int]
    fp8_flops: float
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    memory: int
    source: str

    def peak(self, precision: Precision) -> float:
        """FLOP/s in one precision."""
        return {"fp8": self.fp8_flops, "bf16": self.bf16_flops, "fp32": self.fp32_flops}[precision]


DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device(
            "RTX 4090",
            (8, 9),
            330.3e12,
            165.2e12,
            82.6e12,
            1008e9,
            24 * 2**30,
            "NVIDIA Ada GPU Architecture whitepaper, appendix on GeForce RTX 4090",
        ),
        Device(
            "L40S",
            (8, 9),
            733e12,
            362e12,
            91.6e12,
            864e9,
            48 * 2**30,
            "NVIDIA L40S data sheet (its larger figures are with sparsity)",
        ),
        Device(
            "H100 SXM",
            (9, 0),
            1979e12,
            989e12,
            67e12,
            3350e9,
            80 * 2**30,
            "NVIDIA H100 data sheet and Hopper architecture whitepaper",
        ),
        Device(
            "B200",
            (10, 0),
            4500e12,
            2250e12,
            80e12,
            8000e9,
            192 * 2**30,
            "NVIDIA Blackwell architecture technical brief; FP32 rate approximate",
        ),
    )
}
"""By name."""
