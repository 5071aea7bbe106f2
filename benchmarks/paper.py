"""What the paper reports (arXiv:2510.24061): one RTX 4090, batch 16, rank 64, 1,875 steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row of the paper's tables.

    Attributes:
        name: As the paper calls it.
        step_7b, step_13b: Seconds a step on an RTX 4090; None where there is none.
        mmlu_alpaca, mmlu_oasst1: MMLU of the 7B model after training.
    """

    name: str
    step_7b: float
    step_13b: float | None
    mmlu_alpaca: float
    mmlu_oasst1: float


PAPER = {
    "lora": Published("LoRA FP16", 2.87, None, 0.3456, 0.3656),
    "qlora": Published("QLoRA NF4", 5.45, 9.37, 0.3272, 0.3564),
    "qa_lora": Published("QA-LoRA INT4", 9.44, 18.02, 0.3548, 0.3609),
    "ir_qlora": Published("IR-QLoRA NF4", 8.27, 14.46, 0.3388, 0.3605),
    "fp6_e2m3": Published("FP6-LLM E2M3", 2.72, 10.19, 0.2295, 0.2308),
    "fp6_e3m2": Published("FP6-LLM E3M2", 2.72, 10.19, 0.2509, 0.2330),
    "torchao_fp8": Published("TorchAO FP8 + LoRA", 2.18, None, 0.3393, 0.3452),
    "fishman": Published("Fishman et al. FP8 + LoRA", 2.29, None, 0.3537, 0.3401),
    "falqon": Published("FALQON", 1.80, 3.26, 0.3491, 0.3481),
}
"""By the name of the method's overlay."""
