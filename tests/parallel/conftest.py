"""Starting several processes for several runs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.register_assert_rewrite("cases_checkpoints", "cases_ddp", "cases_fsdp", "cases_tensor")
ROOT = Path(__file__).parents[2]


def torchrun(ranks: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            f"--nproc_per_node={ranks}",
            *map(str, arguments),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class Jobs:
    """Runs to be made by one start of several processes, and what they noted."""

    def __init__(self, root: Path, ranks: int) -> None:
        self.root, self.ranks = root, ranks
        self.jobs: list[dict[str, Any]] = []
        self.output = ""

    def directory(self, name: str) -> Path:
        """Of the run."""
        return self.root / f"{name}-{self.ranks}"

    def add(self, name: str, config: dict[str, Any], *flags: str, **more: Any) -> None:
        """Add a run; `into` names an earlier one whose directory it uses, `answers` asks for
        answers before and after."""
        assert all(job["name"] != name for job in self.jobs)
        config = copy.deepcopy(config)
        root = self.directory(more.pop("into", name))
        notes = self.root / f"notes-{name}-{self.ranks}"
        for path in (root, notes):
            path.mkdir(exist_ok=True)
        trainer = config["trainer"]
        trainer |= {"default_root_dir": str(root), "devices": self.ranks}
        trainer.setdefault("strategy", "ddp")
        config["report"]["sample_answer"] = more.pop("answers", False)
        path = self.root / f"{name}-{self.ranks}.yaml"
        path.write_text(yaml.safe_dump(config))
        self.jobs.append(
            {"name": name, "config": str(path), "notes": str(notes), "flags": list(flags), **more}
        )

    def run(self) -> None:
        """Run all that was added."""
        path = self.root / f"jobs-{self.ranks}.json"
        path.write_text(json.dumps(self.jobs))
        result = torchrun(self.ranks, Path(__file__).with_name("worker.py"), path)
        self.output = result.stdout + result.stderr
        assert result.returncode == 0, self.output

    def notes(self, name: str) -> list[dict[str, Any]]:
        """What each rank noted about a run."""
        directory = self.root / f"notes-{name}-{self.ranks}"
        return [json.loads((directory / f"rank{r}.json").read_text()) for r in range(self.ranks)]


@pytest.fixture
def jobs(tmp_path: Path) -> Callable[[int], Jobs]:
    """Makes a list of runs for so many ranks."""
    return lambda ranks: Jobs(tmp_path, ranks)
