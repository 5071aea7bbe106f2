"""Registered operations in Triton's interpreter: schema, fake results, and tracing agree with them.

Run by test_triton.py in a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from falqon.fp8 import E4M3, E5M2, encode
from falqon.kernels.backbone_matmul import backbone_matmul_gpu, backbone_matmul_onto_gpu
from falqon.kernels.melded_matmul import adapter_matmul_gpu, backbone_outputs_gpu, melded_matmul_gpu
from falqon.kernels.proxy_grad import proxy_grad_gpu
from falqon.kernels.quantize import quantize_delayed_gpu, quantize_gpu
from falqon.kernels.rms_norm_quantize import rms_norm_grad_gpu, rms_norm_quantize_gpu
from falqon.kernels.swiglu_quantize import swiglu_grad_gpu, swiglu_quantize_gpu
from tests.policies import random

CODES = [encode(random(12, 16, seed=n), E4M3) for n in range(2)]  # 8 rows, 4 rows of A each
SCALES = [torch.ones(1), torch.full((1,), 2.0)]
X = random(5, 16, seed=2).bfloat16()
INVERSE, WEIGHT = torch.ones(5, 1), torch.ones(16).bfloat16()
INPUT, GRADIENT = encode(random(5, 16), E4M3), encode(random(5, 16), E5M2)
BIASES = [None, random(8).bfloat16()]
ONTO = random(5, 8, seed=3).bfloat16()
CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "per token": (quantize_gpu, (X, "e4m3", "per_token", "power_of_two")),
    "per tensor": (quantize_gpu, (X.t(), "e5m2", "per_tensor", "none")),
    "delayed": (quantize_delayed_gpu, (X, "e5m2", torch.ones(1), True)),
    "delayed, not observed": (quantize_delayed_gpu, (X, "e4m3", torch.ones(1), False)),
    "norm": (rms_norm_quantize_gpu, (X, WEIGHT, 1e-5, "e4m3", "power_of_two")),
    "norm, backward": (rms_norm_grad_gpu, (X, X, WEIGHT, INVERSE)),
    "swiglu": (swiglu_quantize_gpu, (X, X, "e4m3", "power_of_two")),
    "swiglu, backward": (swiglu_grad_gpu, (X, X, X)),
    "proxy grad": (proxy_grad_gpu, (X.half(), random(5, 3).half())),
    "melded": (
        melded_matmul_gpu,
        (INPUT, torch.ones(5, 1), CODES, SCALES, BIASES, 4, torch.bfloat16),
    ),
    "adapters": (
        adapter_matmul_gpu,
        (INPUT, torch.ones(5, 1), CODES, SCALES, 4, torch.bfloat16),
    ),
    "outputs, onto": (
        backbone_outputs_gpu,
        (INPUT, torch.ones(5, 1), CODES, SCALES, BIASES, 4, torch.bfloat16, [ONTO, 2 * ONTO]),
    ),
    "backbone, onto": (
        backbone_matmul_onto_gpu,
        (GRADIENT, torch.ones(1), CODES, SCALES[0], 4, False, random(5, 16)),
    ),
    "backbone": (
        backbone_matmul_gpu,
        (GRADIENT, torch.ones(1), CODES, SCALES[0], 4, torch.float32, False),
    ),
    "backbone, kept": (
        backbone_matmul_gpu,
        (GRADIENT, torch.ones(5, 1), CODES, SCALES[0], 4, torch.bfloat16, True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_registration(name: str) -> None:
    operation, arguments = CASES[name]
    torch.library.opcheck(operation, arguments)
