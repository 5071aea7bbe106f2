"""What a rank of FSDP2 allocates in a training step, counted by the profiler on a CPU.

    python -m benchmarks.shard_memory --ranks N --layers 12 --hidden 512
    torchrun --nproc-per-node N -m benchmarks.shard_memory --layers 12 --hidden 512

A stack of decoder layers with random weights is melded and trained for some steps, cut up over N
ranks (one rank: whole). Printed are the ranks, rank 0's bytes at rest (its parts of the parameters,
B's gradients and moments), the most that a step allocates beyond them, in the best and in the worst
of the steps, and what a decoder layer has; MiB. With few tokens a step allocates what is gathered
at a time. The first command is one process that makes believe to be rank 0: what it gathers is of
the right size and arrives at once, as torch's `fake` backend has it, so all steps are alike. The
second really gathers, over gloo, whose threads free late, and how late differs, what they are done
with.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaModel

from falqon.parallel.sharding import decoder_layers, shard
from falqon.precision import FalqonPrecision


def local_bytes(tensor: Tensor) -> int:
    """Bytes of what this rank has of a tensor."""
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes


def peak_bytes(record: profile) -> int:
    """Most bytes that were allocated at a time since the record began."""
    held = peak = 0
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def build(args: argparse.Namespace) -> tuple[LlamaModel, FalqonPrecision]:
    """The melded stack, cut up if there is more than one rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=args.tokens,
    )
    model = LlamaModel(config).requires_grad_(False)
    plugin = FalqonPrecision(rank=args.rank, update=args.update)
    plugin.convert(model)
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    if dist.get_world_size() > 1:
        shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        plugin.shard()
    return model.train(), plugin


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1, help="without torchrun")
    parser.add_argument("--checkpointing", action="store_true", help="of gradients, layer by layer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--update", default="paper")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.ranks)
    model, plugin = build(args)
    block = decoder_layers(model)[0]
    layer = sum(p.numel() * p.element_size() for p in block.parameters())  # whole
    trained = [layer.B for layer in plugin.layers.values()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, foreach=False)
    hidden = torch.randn(1, args.tokens, args.hidden, dtype=torch.bfloat16)

    def step() -> None:
        model(inputs_embeds=hidden, use_cache=False).last_hidden_state.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert plugin.proxy_update is not None
        plugin.proxy_update.step(plugin.steps)
        plugin.steps += 1

    step()
    step()
    peaks = []
    for _ in range(args.steps):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            step()
        peaks.append(peak_bytes(record))
    rest = sum(local_bytes(p) for p in model.parameters())
    rest += sum(3 * local_bytes(p) for p in trained)
    if dist.get_rank() == 0:
        print(
            f"| {dist.get_world_size()} | {rest / 2**20:.1f} | {min(peaks) / 2**20:.1f} | "
            f"{max(peaks) / 2**20:.1f} | {layer / 2**20:.1f} |"
        )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
