"""Two nodes, both on this machine: by torchrun's rendezvous, and by the variables of SLURM."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from falqon.checkpoint import read_checkpoint, training_hash

ROOT = Path(__file__).parents[2]
LAST = Path("checkpoints") / "last.ckpt"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


def slurm(node: int, port: int) -> dict[str, str]:
    """What srun gives to the only task of each of two nodes."""
    variables = {
        "NTASKS": 2,
        "NTASKS_PER_NODE": 1,
        "JOB_ID": 1,
        "JOB_NAME": "falqon",
        "JOB_NODELIST": "localhost",
        "NODELIST": "localhost",
        "NNODES": 2,
        "PROCID": node,
        "NODEID": node,
        "LOCALID": 0,
    }
    named = {f"SLURM_{name}": str(value) for name, value in variables.items()}
    return named | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_nodes(launcher: str, tiny_run: Callable, cli: Callable, tmp_path: Path) -> None:
    config = tiny_run(update="anchored")
    config["model"]["init_args"]["exact_sums"] = True  # to be compared with one device
    config["data"]["init_args"]["batch_size"] = 2
    config["report"]["sample_answer"] = False
    root = config["trainer"]["default_root_dir"]
    config["trainer"] |= {"limit_val_batches": 0, "max_steps": 2}
    config["trainer"] |= {"num_nodes": 2, "devices": 1, "strategy": "fsdp2"}
    config["checkpoint"]["complete"] = True
    path = tmp_path / "nodes.yaml"
    path.write_text(yaml.safe_dump(config))
    port, nodes = free_port(), []
    for node in range(2):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        start = [sys.executable]
        if launcher == "torchrun":
            start += ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
            start += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=x"]
        else:
            environment |= slurm(node, port)
        command = [*start, str(ROOT / "train.py"), "fit", "--config", str(path)]
        nodes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = [node.communicate(timeout=300)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum(output.count("Run report") for output in outputs) == 1

    config["trainer"] |= {"num_nodes": 1, "strategy": "auto"}
    config["trainer"]["default_root_dir"] = str(tmp_path / "one")
    config["data"]["init_args"]["batch_size"] = 4
    cli("fit", config)
    found, wanted = (read_checkpoint(Path(r) / LAST) for r in (root, tmp_path / "one"))
    assert training_hash(found) == training_hash(wanted)
