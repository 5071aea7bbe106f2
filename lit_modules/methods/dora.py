"""DoRA (arXiv:2402.09353): LoRA on the direction of the weights, from peft."""

from __future__ import annotations

from typing import Any

from lit_modules.methods.lora import LoRA


class DoRA(LoRA):
    """m (W + alpha / r B A) x / ||W + alpha / r B A|| with m, A and B trained (eq. 5 of the paper).

    m [out] starts as the norms of the rows of W. The norms under the fraction are constants to
    autograd, as the paper's section 4.3 has it. Settings as LoRA's.
    """

    name = "dora"

    def options(self) -> dict[str, Any]:
        """DoRA's switch."""
        return {"use_dora": True}
