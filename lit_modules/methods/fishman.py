"""FP8 training of Fishman et al. with LoRA (arXiv:2409.12517): delayed scaling, Smooth-SwiGLU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from falqon.errors import InputError
from falqon.fp8 import E4M3, E5M2, compute_scale, decode, dequantize, encode, quantize
from falqon.kernels import BackboneMatmul, MeldedMatmul, Quantize
from falqon.scaling import DelayedScaling
from lit_modules.methods.quantised import KeepsDtypes, LoraOnFrozen, QuantisedLinear, frozen

Scaling = Literal["delayed", "dynamic"]


def smooth_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q of Smooth-SwiGLU: one scale a channel (paper's eq. 3, sec. 4.4).

    `s_i = max(E4M3) / max_t |x_ti|`, rounded down to a power of two so that undoing it is exact.

    Args:
        x: [T, n], the product of a SwiGLU.

    Returns:
        codes uint8 [T, n]; scale float32 [1, n].
    """
    scale = compute_scale(x.abs().amax(0, keepdim=True), E4M3)
    return encode(x.float() * scale, E4M3), scale


class _Fp8Function(torch.autograd.Function):
    """`Q(x) Q(W)^T` forward, `Q_E5M2(g) Q(W)` backward; nothing of the input is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Fp8Linear) -> Tensor:
        ctx.layer = layer
        rows = x.flatten(0, -2)
        if layer.smooth:
            codes, scale = smooth_quantise(rows)
            values = (decode(codes, E4M3) / scale).to(x.dtype)
            out = functional.linear(values, layer.dequantise(x.dtype), layer.bias)
        else:
            codes, scale = layer.quantize_input(rows)
            outs, _ = layer.multiply(
                codes, scale, [layer.codes], [layer.scale], [layer.bias], x.dtype
            )
            out = outs[0]
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer: Fp8Linear = ctx.layer
        codes, scale = layer.quantize_gradient(grad.flatten(0, -2).contiguous())
        d_input = layer.multiply_back(codes, scale, [layer.codes], layer.scale, grad.dtype)
        return d_input.unflatten(0, grad.shape[:-1]), None


class Fp8Linear(QuantisedLinear):
    """A frozen linear layer in FP8, by the kernels that FALQON's layers use.

    Args:
        linear: the layer to be replaced.
        scaling: of inputs and gradients, one scale a tensor: `delayed` takes it from the amax of
            past steps, `dynamic` from the tensor at hand.
        smooth: the input is the product of a SwiGLU; its scales are one a channel.

    Attributes:
        codes: uint8 [out, in], E4M3.
        scale: float32 [1], a power of two; value = code value / scale.
    """

    def __init__(self, linear: nn.Linear, scaling: Scaling, smooth: bool) -> None:
        super().__init__(linear)
        codes, scale = quantize(linear.weight.detach(), E4M3)
        self.codes, self.scale, self.smooth = frozen(codes), frozen(scale), smooth
        delayed = scaling == "delayed"
        self.quantize_input = Quantize(E4M3, "per_tensor", delayed=delayed and not smooth)
        self.quantize_gradient = Quantize(E5M2, "per_tensor", delayed=delayed)
        self.multiply = MeldedMatmul(0, power_of_two=True)
        self.multiply_back = BackboneMatmul(0, power_of_two=True)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Values of the codes; exact in bfloat16."""
        return dequantize(self.codes, self.scale, E4M3, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in the dtype of `x`."""
        return _Fp8Function.apply(x, self)


class AmaxHistory(KeepsDtypes):
    """The histories of `DelayedScaling` in the model, so that a checkpoint has them.

    Attributes:
        steps: float32 [quantisers, steps], the newest last; 0: not seen.
    """

    def __init__(self, quantisers: int, steps: int) -> None:
        super().__init__()
        self.steps = frozen(torch.zeros(quantisers, steps))


class Fishman(LoraOnFrozen):
    """FP8 matmuls with delayed scaling and Smooth-SwiGLU; LoRA in bfloat16.

    Smooth-SwiGLU scales each channel of `silu(gate) * up` before quantising it for `down`, so that
    an outlier channel does not cost the others their precision. (The paper's FP8 Adam moments are
    the optimizer's matter: bitsandbytes has 8-bit ones.)

    The merged model's inputs are no longer rounded to FP8.

    Settings: on a GPU the kernels that FALQON's layers run on; the smooth layers, which need one
    scale for each channel that is summed over, multiply the rounded values in bfloat16.

    Args:
        rank: r.
        alpha: The product B A is multiplied by alpha / r.
        scaling: `delayed` or `dynamic`.
        history: Optimizer steps that delayed scaling looks back.
        smooth: Smooth-SwiGLU for layers called `down_proj` beside a `gate_proj` and an `up_proj`.

    Raises:
        InputError: for a value out of range.
    """

    name = "fishman"

    def __init__(
        self,
        rank: int = 64,
        alpha: float = 16.0,
        scaling: Scaling = "delayed",
        history: int = 16,
        smooth: bool = True,
    ) -> None:
        super().__init__(rank, alpha)
        if scaling not in get_args(Scaling):
            raise InputError(f"method.scaling is {scaling!r}; choose delayed or dynamic.")
        if history < 1:
            raise InputError(f"method.history is {history}; it must be at least 1.")
        self.scaling, self.history, self.smooth = scaling, history, smooth
        self.delayed: DelayedScaling | None = None
        self.amaxes: AmaxHistory | None = None

    def convert(self, name: str, linear: nn.Linear) -> Fp8Linear:
        """E4M3 with one scale."""
        return Fp8Linear(linear, self.scaling, name in self.smooth_layers)

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Convert, adapt, and keep the quantisers' amax histories where a checkpoint has them.

        Raises:
            InputError: with `smooth` for a model without SwiGLU.
        """
        names = {n.rpartition(".")[0] for n, _ in model.named_modules() if n.endswith(".gate_proj")}
        self.smooth_layers = {f"{n}.down_proj" for n in names} if self.smooth else set()
        if self.smooth and not names:
            raise InputError(
                f"{type(model).__name__} has no layer called gate_proj, so no SwiGLU to smooth: "
                "set method.smooth to false."
            )
        super().prepare(model)
        self.delayed = DelayedScaling(model, self.history)
        if self.scaling == "delayed":
            self.amaxes = AmaxHistory(len(self.delayed.quantizers), self.history)
            model.add_module("amaxes", self.amaxes.to(self.device))
        return model

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What is trained, and the amax histories."""
        histories = {} if self.amaxes is None else {"amaxes.steps": self.amaxes.steps.detach()}
        return super().state(model) | histories

    def compute(self) -> AbstractContextManager[Any]:
        """As `Method.compute`; restores the scales if a checkpoint has been loaded."""
        if self.delayed is not None and self.amaxes is not None and self.delayed.history is None:
            steps = self.amaxes.steps.detach()
            if steps.any():
                state = {"names": list(self.delayed.quantizers), "overflowed": None}
                self.delayed.load_state_dict(state | {"history": steps.clone()})
        return super().compute()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Take the amax of this step into the histories."""
        if self.delayed is None or self.amaxes is None:
            return
        self.delayed.advance()
        history = self.delayed.history
        if history is not None:
            self.amaxes.steps.data[:, -history.shape[1] :] = history
