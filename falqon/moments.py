"""What melded layers are given: second moments of their inputs, for rounding that compensates."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle

from falqon.linear import MeldedLinear
from falqon.parallel.layers import ShardedLayer, whole_input


class InputMoments:
    """Sums `x x^T` over all inputs of melded layers that run within its `with` block.

    Every token is scaled to unit length first. Otherwise the few tokens with massive activations
    (the first of a sequence, above all before down_proj) would outweigh all others.

    Tokens that are not finite do not count.

    Layers that are given the same tensor, as q, k and v are, share one matrix.

    Args:
        layers: by full name.
    """

    def __init__(self, layers: Mapping[str, MeldedLinear]) -> None:
        self.layers = layers
        self._moments: dict[str, Tensor] = {}
        self._owner: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> InputMoments:
        for name, layer in self.layers.items():

            def hook(
                _: nn.Module, args: tuple[Any, ...], given: dict[str, Any], name: str = name
            ) -> None:
                self._add(name, args[0] if args else given["x"])

            self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._last = None

    @torch.no_grad()
    def _add(self, name: str, x: Tensor) -> None:
        if name not in self._owner:
            shared = self._last is not None and self._last[0] is x
            self._owner[name] = self._last[1] if shared and self._last is not None else name
        if self._owner[name] != name:
            return
        self._last = (x, name)
        x = whole_input(self.layers[name], x)
        rows = torch.nn.functional.normalize(x.detach().reshape(-1, x.shape[-1]).float(), eps=1e-30)
        rows = torch.where(torch.isfinite(rows).all(dim=1, keepdim=True), rows, 0.0)
        if name not in self._moments:
            self._moments[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self._moments[name].addmm_(rows.t(), rows)

    def broadcast(self) -> None:
        """Take over rank zero's sums: ranks that differ in a last bit would write other codes."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for moment in self._moments.values():
                dist.broadcast(moment, 0)

    def owner(self, name: str) -> str:
        """The layer whose matrix is this layer's; its own name if it shares none or never ran."""
        return self._owner.get(name, name)

    def moment(self, name: str) -> Tensor:
        """Second moment of a layer's inputs, float32 [in, in]; zero if it never ran."""
        layer = self.layers[name]
        if self.owner(name) not in self._moments:
            size = ShardedLayer(layer).in_features
            return torch.zeros(size, size, device=layer.codes.device)
        return self._moments[self.owner(name)]
