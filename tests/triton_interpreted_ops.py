"""Registered operations in Triton's interpreter: schema, fake results, and tracing agree with them.

Run by test_triton.py in a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from falqon.fp8 import E4M3, encode
from falqon.kernels.proxy_grad import proxy_grad_gpu
from falqon.kernels.quantize import quantize_delayed_gpu, quantize_gpu
from falqon.kernels.scaled_matmul import scaled_matmul_gpu, transpose_gpu
from tests.policies import random

CODES = encode(random(24, 16, seed=1), E4M3)  # two layers of 8 rows, with 4 rows of A each
X = random(5, 16, seed=2).bfloat16()
SEGMENTS = [0, 8, 0, 0, 8, 4, 0, 1, 12, 8, 8, 0, 20, 4, 4, 1]
CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "per token": (quantize_gpu, (X, "e4m3", "per_token", "power_of_two")),
    "per tensor": (quantize_gpu, (X.t(), "e5m2", "per_tensor", "none")),
    "delayed": (quantize_delayed_gpu, (X, "e5m2", torch.ones(1), True)),
    "delayed, not observed": (quantize_delayed_gpu, (X, "e4m3", torch.ones(1), False)),
    "proxy grad": (proxy_grad_gpu, (X.half(), random(5, 3).half())),
    "transpose": (transpose_gpu, (CODES, 16, [8], 4)),
    "forward": (
        scaled_matmul_gpu,
        (
            encode(random(5, 16), E4M3),
            torch.ones(5, 1),
            "e4m3",
            CODES,
            torch.ones(2),
            SEGMENTS,
            torch.bfloat16,
            random(16).bfloat16(),
            None,
            4,
        ),
    ),
    "backward": (
        scaled_matmul_gpu,
        (
            encode(random(5, 20), E4M3),
            torch.ones(1),
            "e5m2",
            CODES,
            torch.ones(1),
            [0, 16, 0, 0],
            torch.float32,
            None,
            [20],
            4,
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_registration(name: str) -> None:
    operation, arguments = CASES[name]
    torch.library.opcheck(operation, arguments)
