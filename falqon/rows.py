"""The rows of one melded layer: what the proxy update keeps about them, and which come first."""

from __future__ import annotations

import torch
from torch import Tensor

from falqon.fp8 import E4M3, encode
from falqon.linear import MeldedLinear
from falqon.parallel.layers import ShardedLayer
from falqon.recipe import UpdateRecipe


def select_rows(score: Tensor, count: int, since: Tensor | None = None, extra: int = 0) -> Tensor:
    """The rows with the largest score, after those that have waited longest.

    Ties go to the lower row, so that the choice is the same on every device.

    Args:
        score: float32 [out]; rows whose score is not finite come last.
        count: rows to take by score.
        since: int [out], the step in which each row was last written.
        extra: rows to take before those, the longest unwritten ones.

    Returns:
        int64 row numbers, at most `out`.
    """
    if count + extra >= len(score):
        return torch.arange(len(score), device=score.device)
    # NaN sorts first otherwise and would crowd out rows that can be written.
    score = torch.where(torch.isfinite(score), score, torch.full_like(score, -1.0))
    if since is None or not extra:
        return torch.sort(score, descending=True, stable=True).indices[:count]
    oldest = torch.sort(since, stable=True).indices[:extra]
    score = score.index_fill(0, oldest, -2.0)
    return torch.cat([oldest, torch.sort(score, descending=True, stable=True).indices[:count]])


class RowState:
    """What the update keeps about the rows of one layer beside its parameters.

    Attributes:
        layer: the layer, or what this rank sees of it.
        steps: optimizer steps that this layer has seen.
        last_written: int32 [out] on the layer's device: the value of `steps` when a row was last
            written, -1 if it never was.
        touched: bool [out] on the layer's device: rows whose codes may not be those of the start.
        original: what rows are derived from, in host memory: uint8 or floating [out, in] (this
            rank's part of it), or None.
        applied: float32 [out, r] in host memory: all of B that has been written so far, or None.
    """

    def __init__(
        self, layer: MeldedLinear, recipe: UpdateRecipe, weight: Tensor | None, pin: bool = True
    ) -> None:
        out = layer.out_features
        self.layer: MeldedLinear | ShardedLayer = layer
        self.steps = 0
        self.is_mapped = not pin
        self.last_written = torch.full((out,), -1, dtype=torch.int32, device="cpu")
        self.touched = torch.zeros(out, dtype=torch.bool, device="cpu")
        self.original: Tensor | None = None
        self.applied: Tensor | None = None
        if recipe.keeps_originals:
            if recipe.written == "codes":
                weight = layer.codes.detach()[:out].to("cpu", copy=True)
            assert weight is not None
            self.original = weight.cpu()
            self.applied = torch.zeros(out, layer.rank, device="cpu")
            if layer.codes.is_cuda and pin:
                self.original, self.applied = self.original.pin_memory(), self.applied.pin_memory()
        self.forget()

    def forget(self) -> None:
        """Drop what is derived from the codes, after these were loaded from a checkpoint."""
        self._gram: Tensor | None = None
        self._gram_inverse: Tensor | None = None
        self._binades: Tensor | None = None

    def shard(self, view: ShardedLayer) -> None:
        """Go on with a layer that was cut up, and with that part of what its rows come from."""
        if isinstance(self.layer, ShardedLayer):
            return
        self.layer = view
        if self.original is not None:
            part = view.part_of(self.original)
            # A map of a file stays one: what is not read of it takes no memory.
            self.original = part if self.is_mapped else part.clone()
        self.forget()

    def open(self) -> None:
        """Before anything looks at B: gather it where it is cut up."""
        if isinstance(self.layer, ShardedLayer):
            self.layer.open()

    def close(self) -> None:
        """After B was written to."""
        if isinstance(self.layer, ShardedLayer):
            self.layer.close()

    def follow(self) -> None:
        """Move to the device that the layer has moved to."""
        device = self.layer.codes.device
        if self.last_written.device != device:
            self.last_written = self.last_written.to(device)
            self.touched = self.touched.to(device)
            self.forget()

    def touch(self, rows: Tensor) -> None:
        """Mark rows, int64 [k], as touched."""
        self.touched[rows.to(self.touched.device)] = True

    def is_consistent(self) -> bool:
        """The codes are those of the originals, or it is recorded how they came to be others."""
        if self.original is None or self.applied is None or bool(self.applied.any()):
            return True
        codes = self.backbone.cpu()
        if self.original.dtype == codes.dtype:
            return torch.equal(self.original, codes)
        if codes.dtype != torch.uint8:
            return torch.equal(self.original.to(codes.dtype), codes)
        scale = self.layer.scale.detach().cpu()
        return torch.equal(encode(self.original.float() * scale, E4M3, overwrite=True), codes)

    @property
    def own_b(self) -> Tensor:
        """The rows of B that are here, to be written to."""
        layer = self.layer
        return layer.own_b()[1] if isinstance(layer, ShardedLayer) else layer.B.detach()

    def pending_sums(self) -> Tensor:
        """Of the rows of B that are here and count: squared norm of what is pending, steps that
        rows with something pending have waited, and their number; float64 [3]."""
        layer, first, counts = self.layer, 0, True
        if isinstance(layer, ShardedLayer):
            first, _ = layer.own_b()
            counts = layer.gives_b
        change = self.own_b * layer.lora_scaling
        waiting = (change != 0).any(dim=1)
        self.follow()
        age = (self.steps - 1 - self.last_written[first : first + len(change)]) * waiting
        left = self.squares(change).sum(dtype=torch.float64)  # all ranks look at A together
        return torch.stack([left, age.sum().double(), waiting.sum().double()]) * counts

    @property
    def backbone(self) -> Tensor:
        """The codes without those of A, as far as they are here."""
        codes = self.layer.codes.detach()
        return codes[: len(codes) - self.layer.rank]

    @property
    def gram(self) -> Tensor:
        """A A^T in weight units, float32 [r, r]."""
        if self._gram is None:
            adapter = self.layer.dequantized_adapter().double()
            self._gram = (adapter @ adapter.t()).float()
        return self._gram

    @property
    def gram_inverse(self) -> Tensor:
        """Pseudo-inverse of A A^T in units of codes, float32 [r, r]."""
        if self._gram_inverse is None:
            adapter = self.layer.dequantized_adapter().double() * self.layer.scale.detach()
            # Directions that A hardly has, as rows that repeat each other, take no part.
            inverse = torch.linalg.pinv(adapter @ adapter.t(), hermitian=True, rtol=1e-6)
            self._gram_inverse = inverse.float()
        return self._gram_inverse

    def squares(self, pending: Tensor) -> Tensor:
        """Squared norm of each row of B A, through A A^T; float32 [out]."""
        return ((pending @ self.gram) * pending).sum(dim=1)

    def expected_flips(self, pending: Tensor) -> Tensor:
        """Share of each row's codes that its pending change is expected to flip, float32 [out].

        Weights are taken to lie anywhere between two codes and the changes of a row to be normal.
        A change d then flips a code whose distance to the next is u with probability
        min(1, |d| / u), on average `erfc(x) + (1 - exp(-x^2)) / (x sqrt(pi))`, x = u / (sd sqrt 2).
        """
        if self._binades is None:
            self._binades = self._count_binades()
        layer = self.layer
        deviation = (self.squares(pending).clamp(min=0) / layer.in_features).sqrt()
        steps = _STEPS.to(deviation.device) / layer.scale.detach()
        x = steps / (deviation[:, None] * 2**0.5)
        share = torch.erfc(x) + (1 - (-x.square()).exp()) / (x * torch.pi**0.5)
        # Without a change x is infinite, and the share 0.
        return (share * self._binades).sum(dim=1)

    def wrote(self, rows: Tensor | None) -> None:
        """Look again at rows whose codes may have changed."""
        if self._binades is None:
            return
        if rows is None or isinstance(self.layer, ShardedLayer):
            self._binades = None
        else:
            self._binades[rows] = binades(self.backbone[rows])

    def _count_binades(self) -> Tensor:
        layer = self.layer
        if not isinstance(layer, ShardedLayer):
            return binades(self.backbone)
        counts = torch.zeros(layer.out_features, 16, device=layer.codes.device)
        counts[slice(*layer.rows)] = binades(self.backbone, share=False)
        layer.sum(counts)  # whole numbers: exact
        return counts / layer.in_features


_STEPS = torch.tensor([2.0 ** (max(exponent, 1) - 10) for exponent in range(16)], device="cpu")
"""Distance of neighbouring E4M3 values by exponent field, in units of codes."""


def binades(codes: Tensor, share: bool = True) -> Tensor:
    """Share of each row's codes by exponent field, which tells the distance to the next code.

    Args:
        codes: uint8 [k, in].
        share: of the row's codes; else their number.

    Returns:
        float32 [k, 16].
    """
    exponent = (codes >> 3) & 15
    counts = torch.stack([(exponent == field).sum(dim=1) for field in range(16)], dim=1)
    return counts / codes.shape[1] if share else counts.float()
