"""Delayed scaling: scales from the amax of past optimizer steps, so that one pass can quantise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from falqon.errors import InputError
from falqon.fp8 import compute_scale
from falqon.kernels import Quantize


class DelayedScaling:
    """Amax histories of all delayed quantisers of a model.

    After an optimizer step the largest amax that a quantiser saw since the last one enters its
    history, and the largest of the history gives its next scale. All ranks use the largest amax of
    any. A quantiser without history computes its scale from the tensor at hand.

    Args:
        model: module whose delayed `Quantize` modules are kept.
        length: history length in optimizer steps.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        self.quantizers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, Quantize) and module.delayed
        }
        self.length = length
        self._like = next(model.parameters(), torch.zeros(0))  # says which device to work on
        self.history: Tensor | None = None  # [quantisers, steps], oldest first; 0: not seen
        self.overflowed: Tensor | None = None  # values beyond a stale scale so far, this rank

    def move(self, like: Tensor) -> None:
        """Work on the device of another tensor from now on."""
        self._like = like

    @torch.no_grad()
    def advance(self) -> None:
        """Take in what was seen since the last call and set the next scales."""
        if not self.quantizers:
            return
        modules = list(self.quantizers.values())
        nothing = torch.zeros(1, device=self._like.device)
        seen = torch.cat([nothing if m.observed_amax is None else m.observed_amax for m in modules])
        # Without a condition that one rank alone could meet: all of them have to get here.
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        if self.history is None and not seen.any():
            return
        counts = [m.overflowed for m in modules if m.overflowed is not None]
        if counts:
            total = torch.stack(counts).sum()
            self.overflowed = total if self.overflowed is None else self.overflowed + total
        seen = torch.where(torch.isfinite(seen), seen, torch.zeros_like(seen))[:, None]
        past = seen[:, :0] if self.history is None else self.history.to(seen.device)
        self.history = torch.cat([past, seen], dim=1)[:, -self.length :]
        self._set_scales()
        for module in modules:
            module.observed_amax = module.overflowed = None

    def _set_scales(self) -> None:
        assert self.history is not None
        largest = self.history.amax(dim=1, keepdim=True)
        known = (largest > 0).flatten().tolist()  # one wait for the device, not one a quantiser
        for module, amax, seen in zip(self.quantizers.values(), largest, known, strict=True):
            module.scale = compute_scale(amax, module.fmt, module.scale_rounding) if seen else None

    def statistics(self) -> dict[str, float]:
        """`scale_<format>` (geometric mean) and `overflowed` (values beyond a stale scale so far).

        Empty without delayed quantisers; waits for the device.
        """
        logs: dict[str, list[float]] = {}
        for module in self.quantizers.values():
            if module.scale is not None:
                logs.setdefault(f"scale_{module.fmt.name}", []).append(float(module.scale.log2()))
        statistics = {name: 2.0 ** (sum(v) / len(v)) for name, v in logs.items()}
        if self.quantizers:
            statistics["overflowed"] = 0.0 if self.overflowed is None else float(self.overflowed)
        return statistics

    def state_dict(self) -> dict[str, Any]:
        """Histories as plain containers and tensors."""
        return {
            "names": list(self.quantizers),
            "history": self.history,
            "overflowed": self.overflowed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the histories and with them the scales.

        Raises:
            InputError: if they belong to other layers.
        """
        if state["names"] != list(self.quantizers):
            raise InputError(
                "the checkpoint's amax histories belong to other layers than this model's: resume "
                "with the model and the layer patterns that it was trained with."
            )
        self.history, self.overflowed = state["history"], state["overflowed"]
        if self.history is not None:
            self._set_scales()
        else:
            for module in self.quantizers.values():
                module.scale = None
