"""`falqon generate`: the answers of predict, whatever they are printed as, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.encoding import Encoder
from datamodules.examples import Example
from datamodules.prompts import AlpacaPrompt, ChatPrompt, GuanacoPrompt
from falqon.cli import main
from falqon.prompts import encode_prompt

FAST = ["--max-new-tokens", "8", "--device", "cpu"]


@pytest.fixture
def run(cli: Callable, tiny_run: Callable) -> tuple[dict, str]:
    """A finished run and its directory."""
    config = tiny_run()
    cli("fit", config)
    return config, config["trainer"]["default_root_dir"]


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_answers_of_predict(
    run: tuple[dict, str],
    cli: Callable,
    alpaca_rows: list[dict],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, root = run
    cli("predict", config, "--ckpt_path", f"{root}/served.ckpt")
    expected = lines((Path(root) / "predictions.jsonl").read_text())
    by_output = {row["output"]: row for row in alpaca_rows}
    rows = [by_output[row["reference"]] for row in expected]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert main(["generate", root, "--prompts-file", str(file), "--json", *FAST]) == 0
    found = lines(capsys.readouterr().out)
    assert [row["answer"] for row in found] == [row["answer"] for row in expected]
    assert [row["reference"] for row in found] == [row["reference"] for row in expected]
    assert [row["row"] for row in found] == list(range(len(rows)))
    # As a file: the same lines, and nothing on stdout.
    out = tmp_path / "new" / "answers.jsonl"
    assert main(["generate", root, "--prompts-file", str(file), "--output", str(out), *FAST]) == 0
    assert capsys.readouterr().out == ""
    assert lines(out.read_text()) == found
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("context", ["", "Blue and red."])
def test_prompts_are_those_of_the_training(
    make_tokenizer: Callable, adds_bos: bool, context: str
) -> None:
    tokenizer = make_tokenizer(adds_bos)
    example = Example(("Name a colour.", "Red."), context, "here")
    styles = {
        "alpaca": AlpacaPrompt("</s>"),
        "guanaco": GuanacoPrompt("</s>"),
        "chat": ChatPrompt(tokenizer),
    }
    if context:
        del styles["guanaco"]  # conversations have none
    for form, style in styles.items():
        encoder = Encoder(tokenizer, style, 512)
        expected = encoder.encode_prompts([style.render(example)])[0].tolist()
        assert encode_prompt(form, tokenizer, "Name a colour.", context) == expected, form
    plain = encode_prompt("plain", tokenizer, "Name a colour.", context)
    text = "Name a colour." + (f"\n\n{context}" if context else "")
    assert plain == tokenizer(text)["input_ids"]


def test_a_stream_is_the_answer_and_a_seed_the_text(
    tokenizer_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = [*FAST, "--temperature", "5", "--top-p", "0.95"]

    def answer(*more: str, seed: int = 1) -> str:
        capsys.readouterr()
        assert main(["generate", tokenizer_dir, *sampled, "--seed", str(seed), *more]) == 0
        return capsys.readouterr().out

    streamed = answer("--prompt", "Name three colours.")
    row = json.loads(answer("--prompt", "Name three colours.", "--json"))
    assert streamed.strip() == row["answer"] != ""
    monkeypatch.setattr("sys.stdin", io.StringIO("Name three colours.\n"))
    assert answer() == streamed
    assert answer("--prompt", "Name three colours.", seed=2) != streamed
    both = answer("--prompt", "Name three colours.", "--prompt", "Why?", "--batch-size", "1")
    assert both.startswith(f"[1] Name three colours.\n{row['answer']}\n\n[2] Why?\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "a", "--prompts-file", "x"], "choose one"),
        (["--prompts-file", "missing.txt"], "missing.txt cannot be read"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size is 0"),
        (["--prompt", "a", "--device", "abacus"], "'abacus' is no device"),
        (["--prompt", "a", "--output", "/"], "is a directory"),
        (["--prompt", "a " * 300], "the model takes 256"),
    ],
)
def test_mistakes(
    arguments: list[str],
    expected: str,
    tokenizer_dir: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", tokenizer_dir, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("falqon: error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{}\n", "line 1: has no text"),
        ('{"prompt": "a"}\n\n[1]\n', "line 3: not an object"),
        ('{"prompt": "a"\n', "line 1: not JSON"),
        ('{"prompt": "a", "input": 3}\n', "must be text"),
        ("\n", "has no prompt"),
    ],
)
def test_mistakes_in_a_file(
    content: str,
    expected: str,
    tmp_path: Path,
    tokenizer_dir: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert main(["generate", tokenizer_dir, "--prompts-file", str(file)]) == 2
    assert expected in capsys.readouterr().err


def test_a_chat_template_that_is_not_there(
    make_tokenizer: Callable, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in Path(tokenizer_dir).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    make_tokenizer(template=None).save_pretrained(tmp_path)
    flags = ["generate", str(tmp_path), "--prompt", "a", "--prompt-format", "chat"]
    assert main(flags) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--prompts-file", "--seed", "--json", "--output", "standard input"):
        assert option in printed
