"""`falqon evaluate`: scores of the model in memory, its base beside it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from falqon.cli import main
from falqon.errors import InputError
from falqon.evaluation import tasks as tasks_module
from falqon.evaluation.harness import TaskSettings, average, run_tasks, with_bos
from falqon.evaluation.mini import DIRECTORY, read
from falqon.evaluation.tasks import COMMONSENSE, load_tasks, split_names
from tests.wandb_file import records

pytest.importorskip("lm_eval")

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of the user's: a YAML file and local data."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "own"
    directory.mkdir()
    file = directory / "own.yaml"
    file.write_text(YAML.format(name="own_quiz", data=DIRECTORY / "falqon_mini_dev.jsonl"))
    return file


def test_a_run_beside_its_base(
    cli: Callable,
    tiny_run: Callable,
    own_task: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_run()
    cli("fit", config)
    monkeypatch.chdir(tmp_path)  # where W&B's files go for a run that has none
    root, out = tmp_path / "run", tmp_path / "new" / "scores.json"
    (tmp_path / "text.txt").write_text("Why is the sky blue? " * 20)
    capsys.readouterr()
    command = ["evaluate", str(root), "--tasks", "falqon_mini", str(own_task), "--limit", "12"]
    command += ["--num_fewshot", "1", "--with-base", "--perplexity", str(tmp_path / "text.txt")]
    assert main([*command, "--output", str(out), "--wandb-mode", "offline", "--wandb"]) == 0
    table = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["tasks"] == ["falqon_mini", "own_quiz"]
    assert report["model"]["file"] == str(root / "served.ckpt")
    assert report["base"]["name"] == config["model"]["init_args"]["model_name"]
    assert report["settings"]["num_fewshot"] == 1
    assert {"torch", "transformers", "lm_eval", "falqon"} <= report["versions"].keys()
    base, model = report["results"]["base"], report["results"]["model"]
    for name, count in (("falqon_mini", 12), ("own_quiz", 5)):
        ours, theirs = model["tasks"][name], base["tasks"][name]
        assert ours["questions"] == theirs["questions"] == count
        assert len(ours["inputs_sha256"]) == 64
        assert ours["inputs_sha256"] == theirs["inputs_sha256"]
        row = next(line for line in table.splitlines() if line.startswith(name))
        assert f"{theirs['metrics']['acc']:.4f}" in row and f"{ours['metrics']['acc']:.4f}" in row
    assert model["perplexity"]["loss"] != base["perplexity"]["loss"]
    assert f"{model['perplexity']['perplexity']:.4f}" in table
    assert model["add_bos"] is base["add_bos"] is False
    assert (report["model"]["sha256"] != report["base"]["sha256"]) and report["base"]["sha256"]
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]
    logged = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in records(next(tmp_path.glob("wandb/offline-run-*")))
        if record.HasField("history")
        for item in record.history.item
    }
    assert logged["eval/falqon_mini/acc"] == model["tasks"]["falqon_mini"]["metrics"]["acc"]
    assert logged["eval_base/text/loss"] == base["perplexity"]["loss"]
    assert any(name.startswith("eval/table") for name in logged)
    # The same scores without a base, on stdout, from the directory of the user's task.
    command = ["evaluate", str(root), "--tasks", str(own_task.parent), "--num-fewshot", "1"]
    assert main([*command, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert list(alone["results"]) == ["model"]
    assert alone["results"]["model"]["tasks"]["own_quiz"] == model["tasks"]["own_quiz"]


def test_accuracy_is_that_of_a_computation_by_hand(
    tiny_llama: Any, make_tokenizer: Callable
) -> None:
    tokenizer = make_tokenizer(adds_bos=False)
    settings = TaskSettings(num_fewshot=0, add_bos=True, batch_size=5)
    tiny_llama.train()  # modes are to be put back
    try:
        found = run_tasks(tiny_llama, tokenizer, load_tasks(["falqon_mini"]), settings)
        assert tiny_llama.training
    finally:
        tiny_llama.eval()
    head = "The following are multiple choice questions (with answers).\n\n"
    right = 0
    for row in read("test"):
        lines = [f"{letter}. {c}" for letter, c in zip("ABCD", row["choices"], strict=True)]
        prompt = head + "\n".join([row["question"], *lines, "Answer:"])
        scores = []
        for letter in "ABCD":
            whole = tokenizer(f"{prompt} {letter}", add_special_tokens=False)["input_ids"]
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            ids = torch.tensor([[1, *whole]])[:, -256:]  # BOS, and the model's longest context
            with torch.no_grad():
                logs = tiny_llama(ids).logits[0].log_softmax(-1)
            count = len(whole) - start
            scores.append(sum(logs[-i - 1, ids[0, -i]].item() for i in range(1, count + 1)))
        right += scores.index(max(scores)) == row["answer"]
    assert found is not None and found["add_bos"] is True
    assert found["tasks"]["falqon_mini"]["metrics"]["acc"] == pytest.approx(right / 72)


def test_the_questions_answered_in_words(tiny_llama: Any, make_tokenizer: Callable) -> None:
    tokenizer, count = make_tokenizer(), 6
    tasks = load_tasks(["falqon_mini_cloze"])
    found = run_tasks(tiny_llama, tokenizer, tasks, TaskSettings(limit=count))
    right = 0
    for row in read("test")[:count]:
        scores = []
        for choice in row["choices"]:
            prompt = f"Question: {row['question']}\nAnswer:"
            whole = tokenizer(f"{prompt} {choice}")["input_ids"]
            with torch.no_grad():
                logs = tiny_llama(torch.tensor([whole])).logits[0].log_softmax(-1)
            start = len(tokenizer(prompt)["input_ids"])
            total = sum(logs[i - 1, whole[i]].item() for i in range(start, len(whole)))
            scores.append(total / len(choice))
        right += scores.index(max(scores)) == row["answer"]
    assert found is not None
    assert found["tasks"]["falqon_mini_cloze"]["metrics"]["acc_norm"] == pytest.approx(
        right / count
    )


@pytest.mark.parametrize("adds", [True, False])
def test_bos(make_tokenizer: Callable, adds: bool) -> None:
    tokenizer = make_tokenizer(adds)
    for wanted, expected in ((None, adds), (True, True), (False, False)):
        copy, does = with_bos(tokenizer, wanted)
        assert does is expected
        ids = copy("Why?", add_special_tokens=does)["input_ids"]
        assert (ids[0] == 1) is expected
        assert ids.count(1) == int(expected)
    assert (tokenizer("a")["input_ids"][0] == 1) is adds
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="has none"):
        with_bos(tokenizer, True)


def test_names() -> None:
    assert split_names(["paper,falqon_mini"]) == ("mmlu", *COMMONSENSE, "falqon_mini")
    with pytest.raises(InputError, match="'piqa' is named twice"):
        split_names(["paper", "piqa"])
    scores = {name: {"metrics": {"acc": i / 10}} for i, name in enumerate(COMMONSENSE)}
    assert average(scores) == pytest.approx(0.3)
    assert average({"piqa": scores["piqa"]}) is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "nothing to evaluate"),
        (["--tasks", "./gone.yaml"], "no task file or directory './gone.yaml'"),
        (["--tasks", "falqon_mini", "--include-path", "gone"], "no directory 'gone'"),
        (["--tasks", "falqon_mini", "--limit", "2.5"], "limit is 2.5"),
        (["--tasks", "falqon_mini", "--num-fewshot", "-1"], "num_fewshot is -1"),
        (["--tasks", "falqon_mini", "--with-base"], "name it with --base"),
        (["--tasks", "falqon_mini", "--output", "."], "is a directory"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    flags: list[str],
    expected: str,
    tokenizer_dir: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr("falqon.loading.load_model", refuse)
    capsys.readouterr()
    assert main(["evaluate", tokenizer_dir, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("falqon: error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


def test_unknown_tasks_and_a_missing_hub(monkeypatch: pytest.MonkeyPatch, own_task: Path) -> None:
    # lm-eval's own thousands of files take ten seconds to read: one of its folders stands for them.
    import lm_eval.tasks as harness

    real = harness.TaskManager
    folder = Path(harness.__file__).parent / "piqa"

    def manager(include_path: Any, include_defaults: bool = True) -> Any:
        paths = [*include_path, folder] if include_defaults else include_path
        return real(include_path=paths, include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", manager)
    with pytest.raises(InputError, match="no task 'piqua'. Did you mean piqa"):
        load_tasks(["piqua"])

    def no_hub(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", no_hub)
    with pytest.raises(InputError, match="task piqa: its data are on the Hugging Face hub"):
        load_tasks(["falqon_mini", "piqa"])
    own_task.write_text("task: own_quiz\noutput_type: nonsense\n")
    with pytest.raises(InputError, match="own.yaml cannot be loaded"):
        load_tasks([str(own_task)])


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'falqon\[eval\]'"):
        load_tasks(["falqon_mini"])
