"""Answers of `predict` as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override


class PredictionFile(BasePredictionWriter):
    """Writes `<default_root_dir>/predictions.jsonl`, one answer a line.

    With several devices every rank writes its own file, `predictions-<rank>.jsonl`. The file has
    another name until it is complete.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._file: TextIO | None = None

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        suffix = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        self._path = root / f"predictions{suffix}.jsonl"
        self._file = self._path.with_suffix(".jsonl.tmp").open("w", encoding="utf-8")

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self._file is not None
        for row in prediction:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._file is not None
        self._file.close()
        self._path.with_suffix(".jsonl.tmp").replace(self._path)
        rank_zero_info(f"answers: {self._path}")
