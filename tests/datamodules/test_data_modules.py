"""The two data modules from file to batch, as a Trainer and the command line use them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from datamodules import AlpacaDataModule, OASST1DataModule
from falqon.errors import InputError


@pytest.fixture
def alpaca(alpaca_file: str, tokenizer_dir: str) -> Callable[..., AlpacaDataModule]:
    def make(**options: Any) -> AlpacaDataModule:
        settings = {"train_path": alpaca_file, "tokenizer_name": tokenizer_dir, **options}
        return AlpacaDataModule(**settings)

    return make


@pytest.fixture
def oasst(
    write_jsonl: Callable[..., str], trees: list[dict[str, Any]], tokenizer_dir: str
) -> Callable[..., OASST1DataModule]:
    def make(**options: Any) -> OASST1DataModule:
        path = write_jsonl(trees, "trees.jsonl")
        settings = {"train_path": path, "tokenizer_name": tokenizer_dir, **options}
        return OASST1DataModule(**settings)

    return make


def learned(module: LightningDataModule, batch: dict[str, torch.Tensor]) -> list[str]:
    """Supervised text of each row of a batch."""
    tokenizer = module.tokenizer  # type: ignore[attr-defined]
    return [tokenizer.decode(row[row != -100].tolist()) for row in batch["labels"]]


def test_alpaca_batches_hold_the_responses(
    alpaca: Callable[..., AlpacaDataModule], alpaca_rows: list[dict[str, str]]
) -> None:
    module = alpaca(batch_size=8)
    module.setup("fit")
    assert module.counts["train"].rows == 36 and module.counts["val"].rows == 4
    texts: list[str] = []
    for batch in [*module.train_dataloader(), *module.val_dataloader()]:
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[1] % 16 == 0
        texts += learned(module, batch)
    assert {row["output"] + "</s>" for row in alpaca_rows} == set(texts)


def test_chat_and_packing(
    alpaca: Callable[..., AlpacaDataModule], alpaca_rows: list[dict[str, str]]
) -> None:
    module = alpaca(prompt="chat", packing=True, batch_size=2, max_length=256, val_fraction=0)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert all(set(b) == {"input_ids", "labels", "position_ids"} for b in batches)
    texts = "".join(text for batch in batches for text in learned(module, batch))
    assert all(row["output"] + "<|im_end|>" in texts for row in alpaca_rows)


def test_oasst_threads_become_conversations(oasst: Callable[..., OASST1DataModule]) -> None:
    module = oasst(val_fraction=0, batch_size=3)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert set(learned(module, batch)) == {
        "Air scatters blue light.<|im_end|>Red is left over.<|im_end|>",
        "Four.<|im_end|>",
        "Acht.<|im_end|>",
    }


def test_guanaco_prompt_from_guanaco_file(
    oasst: Callable[..., OASST1DataModule],
    write_jsonl: Callable[..., str],
    guanaco_rows: list[dict[str, Any]],
) -> None:
    path = write_jsonl(guanaco_rows, "guanaco.jsonl")
    module = oasst(train_path=path, prompt="guanaco", val_fraction=0, batch_size=3)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert " Air scatters blue light.</s> Red is left over.</s>" in learned(module, batch)


def test_trees_and_guanaco_files_are_split_alike(
    oasst: Callable[..., OASST1DataModule],
    write_jsonl: Callable[..., str],
    guanaco_rows: list[dict[str, Any]],
) -> None:
    """The split goes by the tree's first prompt, so it does not depend on the shape of the file."""
    references = []
    for options in ({}, {"train_path": write_jsonl(guanaco_rows, "guanaco.jsonl")}):
        module = oasst(val_fraction=0.4, **options)
        module.setup("validate")
        references.append(sorted(b["reference"] for b in module.predict_dataloader()))
    assert references[0] == references[1]


def test_setup_is_idempotent_and_lazy(alpaca: Callable[..., AlpacaDataModule]) -> None:
    module = alpaca()
    module.setup("validate")
    assert set(module.counts) == {"val"}
    module.setup("fit")
    rows = module.train_dataloader().dataset
    module.setup("fit")
    module.setup(None)
    assert module.train_dataloader().dataset is rows


def test_own_validation_and_test_files(
    alpaca: Callable[..., AlpacaDataModule],
    write_jsonl: Callable[..., str],
    alpaca_rows: list[dict[str, str]],
) -> None:
    val = write_jsonl(alpaca_rows[:5], "val.jsonl")
    test = write_jsonl(alpaca_rows[5:12], "test.jsonl")
    module = alpaca(val_path=val, test_path=test)
    module.setup()
    counts = {name: count.rows for name, count in module.counts.items()}
    assert counts == {"train": 40, "val": 5, "test": 7}
    assert sum(len(b["labels"]) for b in module.test_dataloader()) == 7
    without = alpaca(val_path=val)
    without.setup("test")
    assert sum(len(b["labels"]) for b in without.test_dataloader()) == 5


def test_limits_take_the_first_rows(alpaca: Callable[..., AlpacaDataModule]) -> None:
    module = alpaca(limit_train_rows=6, limit_val_rows=2)
    module.setup()
    assert (module.counts["train"].rows, module.counts["val"].rows) == (6, 2)
    whole = alpaca()
    whole.setup()
    assert module.sample_prompt()[1:] == whole.sample_prompt()[1:]


def test_prompts_have_no_response_and_lead_up_to_it(
    alpaca: Callable[..., AlpacaDataModule],
) -> None:
    module = alpaca(limit_val_rows=3, eval_batch_size=2, val_fraction=0.5)
    module.setup("predict")
    batches = list(module.predict_dataloader())
    assert [b["row"] for b in batches] == [[0, 1], [2]]
    for batch in batches:
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        for ids, mask, text, reference in zip(
            batch["input_ids"],
            batch["attention_mask"],
            batch["prompt_text"],
            batch["reference"],
            strict=True,
        ):
            prompt = module.tokenizer.decode(ids[mask.bool()].tolist())
            assert mask[-1] == 1 and prompt.endswith("### Response:")
            assert text.split("\n\n")[0] in prompt and reference not in prompt
    sample, text, reference = module.sample_prompt()
    assert sample["input_ids"].shape[0] == 1
    assert (text, reference) == (batches[0]["prompt_text"][0], batches[0]["reference"][0])


def test_prompt_text_of_several_turns_reads_as_a_conversation(
    oasst: Callable[..., OASST1DataModule],
) -> None:
    module = oasst(val_fraction=0)
    module.setup("fit")
    _, text, reference = module.sample_prompt()
    assert text == (
        "User: Why is the sky blue?\n\nAssistant: Air scatters blue light.\n\nUser: And at dusk?"
    )
    assert reference == "Red is left over."


def test_print_sample_marks_what_is_learned(
    alpaca: Callable[..., AlpacaDataModule], capsys: pytest.CaptureFixture[str]
) -> None:
    module = alpaca(print_sample=2, val_fraction=0)
    module.setup("fit")
    module.setup("fit")  # printed once
    out = capsys.readouterr().out
    assert out.count("--- training example") == 2
    assert "--- training example 1 of 2: " in out and " supervised (between >>> and <<<)" in out
    assert "Count to number 0.\n\n### Input:\nStart at 0.\n\n### Response:>>>0 end 0.</s><<<" in out


def test_only_rank_zero_prints(
    alpaca: Callable[..., AlpacaDataModule], capsys: pytest.CaptureFixture[str]
) -> None:
    module = alpaca(print_sample=2)
    module.trainer = SimpleNamespace(world_size=1, is_global_zero=False)  # type: ignore[assignment]
    module.setup("fit")
    assert capsys.readouterr().out == ""


def test_skipped_rows_are_counted_and_logged_once(
    alpaca: Callable[..., AlpacaDataModule],
    write_jsonl: Callable[..., str],
    alpaca_rows: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[str] = []
    monkeypatch.setattr("datamodules.base.rank_zero_info", logged.append)
    path = write_jsonl([*alpaca_rows, {"instruction": "Say nothing.", "output": ""}])
    module = alpaca(train_path=path, val_fraction=0)
    module.setup("fit")
    module.setup("fit")
    assert module.counts["train"].skipped_blank == 1 and module.counts["train"].rows == 40
    (line,) = logged
    assert line.startswith("train data: 40 examples, ")
    assert line.endswith("skipped: 1 with a blank response, 0 with nothing supervised")


def test_nothing_left_to_learn_is_an_error(
    alpaca: Callable[..., AlpacaDataModule], write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl([{"instruction": str(i), "output": " "} for i in range(4)])
    with pytest.raises(InputError, match="train data: nothing to learn is left of 4 examples"):
        alpaca(train_path=path, val_fraction=0).setup("fit")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "output": "y"}, "row 2: missing column 'instruction'.*'prompt', 'output'"),
        ({"instruction": "x", "output": None}, "row 2: 'output' is null, expected a string"),
        (
            {"instruction": 3, "output": "y"},
            "row 2: 'instruction' is of type int, expected a string",
        ),
        ({"instruction": "x", "input": 1, "output": "y"}, "row 2: 'input' is of type int"),
        ({"instruction": "x", "output": "\ud83d"}, "row 2: 'output' holds half of a surrogate"),
    ],
)
def test_unusable_alpaca_rows_are_named(
    alpaca: Callable[..., AlpacaDataModule],
    write_jsonl: Callable[..., str],
    row: dict[str, Any],
    message: str,
) -> None:
    path = write_jsonl([{"instruction": "a", "input": None, "output": "b"}, row])
    with pytest.raises(InputError, match=message):
        alpaca(train_path=path).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 is too small; use 1 or more"),
        ({"val_fraction": 1.0}, r"val_fraction: 1.0 is not in \[0, 1\)"),
        ({"max_length": 4}, "max_length: 4 is too small"),
        ({"limit_val_rows": 0}, "limit_val_rows: 0 is too small"),
        ({"seed": -1}, "seed: -1 is too small"),
        ({"prompt": "vicuna"}, "prompt: 'vicuna' is unknown; use alpaca or chat"),
    ],
)
def test_settings_out_of_range(
    alpaca: Callable[..., AlpacaDataModule], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        alpaca(**options)


def test_missing_files_fail_before_the_tokenizer_is_loaded() -> None:
    module = AlpacaDataModule(train_path="no.json", tokenizer_name="no/tokenizer")
    for step in (module.prepare_data, lambda: module.setup("fit")):
        with pytest.raises(InputError, match="train_path: file not found: no.json"):
            step()


def test_pad_token_falls_back_without_resizing(alpaca: Callable[..., AlpacaDataModule]) -> None:
    module = alpaca()
    module._tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=7)
    assert module.pad_token_id == 7
    module._tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=None)
    assert module.pad_token_id == 0
    module._tokenizer = SimpleNamespace(eos_token=None)
    with pytest.raises(InputError, match="has no EOS token"):
        module.eos_token()


# --- Trainer ----------------------------------------------------------------------------------


class Tiny(LightningModule):
    """Counts rows and supervised tokens; predicts the prompts it got."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rows = 0
        self.learned = 0

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.rows += len(batch["input_ids"])
        self.learned += int((batch["labels"] != -100).sum())

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any]) -> list[str]:
        return list(batch["reference"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(**options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **options,
    }
    return Trainer(**settings)


def test_all_stages_without_warnings(
    alpaca: Callable[..., AlpacaDataModule], recwarn: pytest.WarningsRecorder
) -> None:
    module = alpaca(val_fraction=0.25)
    trainer, model = quiet_trainer(max_steps=2), Tiny()
    trainer.fit(model, module)
    model.rows = model.learned = 0
    trainer.validate(model, module, verbose=False)
    assert (model.rows, model.learned) == (10, module.counts["val"].supervised_tokens)
    trainer.test(model, module, verbose=False)
    assert model.rows == 20
    predictions = trainer.predict(model, module)
    assert predictions is not None and sum(map(len, predictions)) == 10
    about_data = [str(w.message) for w in recwarn if "oader" in str(w.message)]
    assert about_data == []


def test_training_without_validation_data(alpaca: Callable[..., AlpacaDataModule]) -> None:
    trainer = quiet_trainer(max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Tiny(), alpaca(val_fraction=0))
    assert trainer.global_step == 2
    with pytest.raises(InputError, match="no validation data; give val_path"):
        trainer.validate(Tiny(), alpaca(val_fraction=0), verbose=False)


def test_lightnings_own_sampler_is_refused_with_several_ranks(
    alpaca: Callable[..., AlpacaDataModule],
) -> None:
    module = alpaca()
    module.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    for step in (lambda: module.setup("fit"), module.train_dataloader):
        with pytest.raises(InputError, match="set trainer.use_distributed_sampler: false"):
            step()


def test_ranks_share_the_rows(alpaca: Callable[..., AlpacaDataModule]) -> None:
    """Validation over two ranks sums to that over one, with batches of equal shape."""
    whole = alpaca(eval_batch_size=4, val_fraction=0.225)
    whole.setup("fit")
    parts = []
    for rank in range(2):
        module = alpaca(eval_batch_size=4, val_fraction=0.225)
        connector = SimpleNamespace(use_distributed_sampler=False)
        module.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=2,
            is_global_zero=rank == 0,
            distributed_sampler_kwargs={"num_replicas": 2, "rank": rank},
            _accelerator_connector=connector,
        )
        module.setup("fit")
        parts.append(module)
    assert whole.counts["val"].rows == 9
    batches = [list(part.val_dataloader()) for part in parts]
    assert [[len(b["labels"]) for b in rank] for rank in batches] == [[4, 1], [4, 1]]
    tokens = sum(int((b["labels"] != -100).sum()) for rank in batches for b in rank)
    assert tokens == whole.counts["val"].supervised_tokens
    rows = [row for part in parts for b in part.predict_dataloader() for row in b["row"]]
    assert sorted(rows) == [0, *range(9)]
    states = [part.train_dataloader().state_dict() for part in parts]
    assert states[0] == states[1]  # a checkpoint of one rank serves all


# --- command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("AlpacaDataModule", {"prompt": "chat"}),
        ("OASST1DataModule", {"prompt": "guanaco", "threads": "all", "lang": "en"}),
    ],
)
def test_yaml_with_class_path(tmp_path: Path, name: str, extra: dict[str, Any]) -> None:
    config = {
        "data": {
            "class_path": f"datamodules.{name}",
            "init_args": {
                "train_path": "x.json",
                "tokenizer_name": "y",
                "batch_size": 2,
                "max_length": 64,
                "limit_train_rows": None,
                "packing": True,
                **extra,
            },
        }
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    parser.add_argument("--config", action="config")
    module = parser.instantiate(parser.parse_args(["--config", str(path)])).data
    assert type(module).__name__ == name
    assert (module.batch_size, module.max_length, module.packing) == (2, 64, True)
    assert module.prompt == extra["prompt"]


def test_a_misspelt_key_in_yaml_is_refused() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    arguments = ["--data=datamodules.AlpacaDataModule", "--data.train_path=x"]
    with pytest.raises(Exception, match="batchsize"):
        parser.parse_args([*arguments, "--data.tokenizer_name=y", "--data.batchsize=3"])
