"""Learning-rate schedules whose warm-up is a share of the training."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from falqon.errors import InputError


class WarmupConstant(LambdaLR):
    """Linear warm-up, then constant; stepped once an optimizer step.

    Args:
        optimizer: whose learning rates are set.
        warmup: length of the warm-up: a share of all steps if below 1, else a number of steps.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.03) -> None:
        if warmup < 0:
            raise InputError(f"warmup is {warmup}; give a share of the steps or a number of steps.")
        self.warmup = warmup
        self.total_steps = 0
        self.warmup_steps = 0 if warmup < 1 else int(warmup)
        super().__init__(optimizer, self._factor)

    def set_total_steps(self, total: int) -> None:
        """Tell how many optimizer steps the training has; before the first of them."""
        self.total_steps = total
        if self.warmup < 1:
            self.warmup_steps = math.ceil(self.warmup * total)
        for group, base, factor in zip(
            self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self._after_warmup(step)

    def _after_warmup(self, step: int) -> float:
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Counters and the warm-up as it was resolved, in plain containers."""
        state = super().state_dict()
        return {k: v for k, v in state.items() if k != "lr_lambdas"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; a changed total keeps the warm-up that was trained with."""
        total = self.total_steps
        super().load_state_dict(state_dict | {"lr_lambdas": [None] * len(self.lr_lambdas)})
        self.total_steps = total


class WarmupCosine(WarmupConstant):
    """Linear warm-up, then a half cosine down to `final` times the learning rate.

    Args:
        optimizer: whose learning rates are set.
        warmup: as in `WarmupConstant`.
        final: factor at the last step.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.03, final: float = 0.0) -> None:
        self.final = final
        super().__init__(optimizer, warmup)

    def _after_warmup(self, step: int) -> float:
        length = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / length)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))
