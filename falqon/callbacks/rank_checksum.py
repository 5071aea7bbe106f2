"""A look from time to time whether all ranks hold the same weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch import distributed as dist
from typing_extensions import override

from falqon.errors import InputError
from falqon.parallel.layers import tensor_part
from falqon.parallel.slices import is_cut
from falqon.precision import FalqonPrecision


class RankChecksum(Callback):
    """Stops a training with several ranks as soon as their weights are found to differ.

    Every rank computes its codes and B anew from the same gradients, and nothing is sent round to
    correct it: a bit that flips in one device's memory would stay there, and in what is saved if
    it is rank zero's. Checked are codes, scales, B, and the sums of B that rows are derived with,
    as far as ranks hold copies of them; one integer of 8 bytes a tensor is exchanged. Other methods
    than FALQON have no such weights, and are not checked.

    Args:
        every_n_steps: optimizer steps between two looks; 0 for none.

    Raises:
        InputError: if that is negative.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 0:
            raise InputError(
                f"rank_checksum.every_n_steps is {every_n_steps}; use 0 (never) or more."
            )
        self.every_n_steps = every_n_steps
        self._checked = 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, n: int
    ) -> None:
        step = trainer.global_step
        if not self.every_n_steps or step == self._checked or step % self.every_n_steps:
            return
        self._checked = step
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Compare now.

        Raises:
            InputError: on all ranks, naming the tensor and the ranks that differ.
        """
        plugin = trainer.precision_plugin
        if trainer.world_size == 1 or not isinstance(plugin, FalqonPrecision):
            return
        tensors = dict(replicated(plugin))
        sums = [checksum(t).to(trainer.strategy.root_device) for t in tensors.values()]
        if not sums:
            return
        own = torch.stack(sums)
        everyone = [torch.empty_like(own) for _ in range(trainer.world_size)]
        dist.all_gather(everyone, own)
        all_sums = torch.stack(everyone).cpu()
        for index, name in enumerate(tensors):
            column: list[int] = all_sums[:, index].tolist()
            if len(set(column)) > 1:
                self._stop(name, column, trainer.global_step)

    @staticmethod
    def _stop(name: str, sums: list[int], step: int) -> None:
        common, _ = Counter(sums).most_common(1)[0]  # of equally many the first: rank zero's
        odd = [str(rank) for rank, value in enumerate(sums) if value != common]
        raise InputError(
            f"the ranks' weights differ after step {step}: {name} on rank {', '.join(odd)} is not "
            f"that of rank {sums.index(common)}. Check the device's memory for errors, and resume "
            "from the last checkpoint before this step."
        )


def replicated(plugin: FalqonPrecision) -> Iterator[tuple[str, Tensor]]:
    """What every rank holds a copy of, by name."""
    for name, layer in plugin.layers.items():
        cut = tensor_part(layer)
        parted = () if cut is None else ("codes", "B") if cut.by_rows else ("codes",)
        for part in ("codes", "scale", "B"):
            tensor = getattr(layer, part)
            if part not in parted and not is_cut(tensor):
                yield f"{name}.{part}", tensor.detach()
    if plugin.proxy_update is not None:
        for name, state in plugin.proxy_update.states.items():
            if state.applied is not None:
                yield f"{name}: sum of B", state.applied


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """An int64 that changes with any bit and any exchange of two words of a tensor.

    Args:
        tensor: any shape and dtype.

    Returns:
        int64 scalar: words of 8 bytes times odd numbers, summed modulo 2^64.
    """
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    data = local.contiguous().reshape(-1).view(torch.uint8)
    end = len(data) // 8 * 8
    words = data[:end].view(torch.int64)
    factors = 2 * torch.arange(len(words), device=data.device) + 1
    rest = data[end:].to(torch.int64)
    places = 2 * torch.arange(len(rest), device=data.device) + 1
    return (words * factors).sum() + ((rest + 1) * places).sum() * 2**40
