"""train.py as a user runs it: files, resume, determinism, subcommands."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from falqon import training
from falqon.checkpoint import read_checkpoint, training_hash
from falqon.cli import main as falqon_command
from falqon.errors import InputError
from falqon.kernels.native import products
from tests.threads import threads

ROOT = Path(__file__).parents[1]
Config = dict[str, Any]


def digest(root: str | Path) -> str:
    return training_hash(read_checkpoint(Path(root) / "checkpoints" / "last.ckpt"))


def rows(root: str | Path) -> list[dict[str, str]]:
    with (Path(root) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def set_root(config: Config, root: Path) -> Path:
    config["trainer"]["default_root_dir"] = str(root)
    return root


def test_a_run_leaves_what_is_promised(
    cli: Callable, tiny_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run()
    config["model"]["init_args"]["compare_with_base"] = True
    cli("fit", config)
    root = Path(config["trainer"]["default_root_dir"])
    table = rows(root)
    steps = [int(r["step"]) for r in table if r["train/loss"]]
    assert steps == list(range(6))
    assert {"lr", "grad_norm", "train/tokens_per_s", "val/perplexity"} <= set(table[0])
    written = [float(r["falqon/rows_written"]) for r in table if r["train/loss"]]
    assert written == [4.0 * 14] * 6  # rank rows in each of 2 x 7 layers
    validated = [int(r["step"]) for r in table if r["val/loss"]]
    assert validated[0] == 0
    # before training, after 3 and 6 steps, and with what was pending then written
    assert len(validated) == 4
    resolved = yaml.safe_load((root / "config.yaml").read_text())
    assert resolved["trainer"]["plugins"][0]["init_args"]["rank"] == 4
    summary = json.loads((root / "summary.json").read_text())
    assert summary["melded_layers"] == 14
    assert summary["val_loss_base"] == pytest.approx(float(table[0]["val/base_loss"]))
    assert summary["val_loss_before"] == pytest.approx(float(table[0]["val/loss"]))
    assert summary["val_loss_after"] < summary["val_loss_before"]
    printed = capsys.readouterr().out
    for part in ("Run report", "left alone", "lm_head", "tokens/s", "answer after", str(root)):
        assert part in printed


def test_ten_and_ten_steps_equal_twenty(cli: Callable, tiny_run: Callable, tmp_path: Path) -> None:
    # 10 batches an epoch, so step 7 lies inside an epoch and step 10 at its end.
    config = tiny_run()
    config["trainer"]["max_steps"] = 20
    straight = set_root(config, tmp_path / "straight")
    cli("fit", config)
    for cut in (7, 10):
        resumed = set_root(config, tmp_path / f"resumed{cut}")
        cli("fit", config, f"--trainer.max_steps={cut}")
        middle = digest(resumed)
        cli("fit", config, f"--ckpt_path={resumed}/checkpoints/last.ckpt")
        assert digest(resumed) == digest(straight) != middle
        columns = ("step", "train/loss", "val/loss", "lr", "grad_norm", "falqon/codes_flipped")
        training = [[r[c] for c in columns] for r in rows(resumed) if r["train/loss"]]
        assert training == [[r[c] for c in columns] for r in rows(straight) if r["train/loss"]]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        config = tiny_run(rounding="stochastic", seed=seed)
        root = set_root(config, tmp_path / f"seed{number}")
        cli("fit", config)
        digests.append(digest(root))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.skipif(products.unit() is None, reason="torch's products may depend on threads")
def test_the_number_of_threads_changes_no_bit(
    cli: Callable, tiny_run: Callable, tokenizer_dir: str, tmp_path: Path
) -> None:
    # As wide as it takes for weights to be sketched, and for torch to share out its operations.
    model = shutil.copytree(tokenizer_dir, tmp_path / "model")
    config = LlamaConfig.from_pretrained(model)
    config.update({"hidden_size": 320, "intermediate_size": 640, "head_dim": 64})
    config.update({"num_attention_heads": 5, "num_key_value_heads": 1})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(model)
    digests, losses = [], []
    for number in (1, 3):
        run = tiny_run(rank=16, update="compensated", rows=None)
        run["model"]["init_args"]["model_name"] = str(model)
        root = set_root(run, tmp_path / f"threads{number}")
        with threads(number):
            cli("fit", run)
        digests.append(digest(root))
        losses.append([(row["train/loss"], row["val/loss"]) for row in rows(root)])
    assert digests[0] == digests[1]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("recipe", ["delayed", "stochastic"])
def test_resume_restores_the_plugin(
    cli: Callable, tiny_run: Callable, tmp_path: Path, recipe: str
) -> None:
    plugin: Config = {"rounding": "stochastic"}
    if recipe == "delayed":
        per_tensor = {"activations": "per_tensor", "gradients": "per_tensor"}
        plugin = {"recipe": {"scaling": "delayed", "amax_history": 3, **per_tensor}}
    config = tiny_run(**plugin)
    straight = set_root(config, tmp_path / "straight")
    cli("fit", config)
    resumed = set_root(config, tmp_path / "resumed")
    cli("fit", config, "--trainer.max_steps=4")
    cli("fit", config, "--ckpt_path=last")
    assert digest(resumed) == digest(straight)
    if recipe == "delayed":
        scales = [r["falqon/scale_e4m3"] for r in rows(resumed) if r["train/loss"]]
        assert scales == [r["falqon/scale_e4m3"] for r in rows(straight) if r["train/loss"]]


def test_a_killed_run_resumes_to_the_same_bits(
    cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    config = tiny_run()
    config["trainer"]["max_steps"] = 80
    straight = set_root(config, tmp_path / "straight")
    cli("fit", config)
    killed = set_root(config, tmp_path / "killed")
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    checkpoint = killed / "checkpoints" / "last.ckpt"
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists(), process.stdout.read().decode() if process.stdout else ""
    assert process.returncode == -signal.SIGKILL
    assert read_checkpoint(checkpoint)["global_step"] < 80
    assert rows(killed)
    cli("fit", config, f"--ckpt_path={checkpoint}")
    assert digest(killed) == digest(straight)
    assert [int(r["step"]) for r in rows(killed) if r["train/loss"]] == list(range(80))


def test_a_run_that_dies_right_after_a_checkpoint_has_the_row_of_its_step(
    cli: Callable, tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run()
    root = set_root(config, tmp_path / "run")
    save = Trainer.save_checkpoint

    def save_and_die(self: Trainer, path: Any, *args: Any, **kwargs: Any) -> None:
        save(self, path, *args, **kwargs)
        raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "save_checkpoint", save_and_die)
    with pytest.raises(RuntimeError, match="killed"):
        cli("fit", config)
    done = read_checkpoint(root / "checkpoints" / "last.ckpt")["global_step"]
    steps = [int(row["step"]) for row in rows(root) if row["train/loss"]]
    assert steps == list(range(done))


def test_accumulated_batches_equal_one_large_batch(
    cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    # Token weighting: four rows a step, at once or one at a time, whatever their lengths.
    losses, norms = [], []
    for accumulate, batch in ((1, 4), (4, 1)):
        config = tiny_run(recipe="none", dtype="fp32")
        root = set_root(config, tmp_path / f"accumulate{accumulate}")
        config["data"]["init_args"] |= {"batch_size": batch, "group_by_length": False}
        config["trainer"]["val_check_interval"] = 4 * accumulate
        cli(
            "fit",
            config,
            f"--trainer.accumulate_grad_batches={accumulate}",
            "--trainer.max_steps=4",
        )
        table = [r for r in rows(root) if r["train/loss"]]
        losses.append([float(r["train/loss"]) for r in table])
        norms.append([float(r["grad_norm"]) for r in table])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_fresh_run_sets_the_old_one_aside(cli: Callable, tiny_run: Callable) -> None:
    config = tiny_run()
    root = Path(config["trainer"]["default_root_dir"])
    cli("fit", config)
    first = digest(root)
    cli("fit", config, "--trainer.max_steps=3")
    assert digest(root) != first
    assert digest(root / "previous" / "1") == first


def test_a_failed_start_leaves_the_old_run_where_it_was(cli: Callable, tiny_run: Callable) -> None:
    config = tiny_run()
    root = Path(config["trainer"]["default_root_dir"])
    cli("fit", config)
    first, files = digest(root), sorted(p.name for p in root.iterdir())
    with pytest.raises(SystemExit):
        cli("fit", tiny_run(rank=4096))
    assert digest(root) == first
    assert sorted(p.name for p in root.iterdir()) == files


def test_starting_from_another_runs_checkpoint_leaves_that_run_alone(
    cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    config = tiny_run()
    other = set_root(config, tmp_path / "other")
    cli("fit", config, "--trainer.max_steps=3")
    root = set_root(config, tmp_path / "mine")
    cli("fit", config)
    mine, table, others = digest(root), rows(root), digest(other)
    cli("fit", config, f"--ckpt_path={other}/checkpoints/last.ckpt")
    assert digest(other) == others
    assert digest(root / "previous" / "1") == mine
    assert rows(root / "previous" / "1") == table
    assert [int(r["step"]) for r in rows(root) if r["train/loss"]] == [3, 4, 5]


def test_resume_as_the_readme_says(cli: Callable, tiny_run: Callable, tmp_path: Path) -> None:
    config = tiny_run()
    straight = set_root(config, tmp_path / "straight")
    cli("fit", config)
    root = set_root(config, tmp_path / "run")
    cli("fit", config, "--trainer.max_steps=4")
    written = root / "config.yaml"
    settings = yaml.safe_load(written.read_text())
    assert settings["ckpt_path"] is None
    cli("fit", settings, "--ckpt_path=last", "--trainer.max_steps=6")
    assert digest(root) == digest(straight)
    assert yaml.safe_load(written.read_text())["ckpt_path"] is None
    cli("predict", yaml.safe_load(written.read_text()), "--ckpt_path=last")


def test_the_best_checkpoint_is_ranked_by_its_own_validation(
    cli: Callable, tiny_run: Callable
) -> None:
    config = tiny_run()
    config["checkpoint"] = {"every_n_train_steps": 2, "save_top_k": 1, "monitor": "val/loss"}
    config["trainer"]["max_steps"] = 7
    cli("fit", config)
    root = Path(config["trainer"]["default_root_dir"])
    losses = {int(r["step"]) + 1: float(r["val/loss"]) for r in rows(root) if r["val/loss"]}
    (best,) = [p for p in (root / "checkpoints").iterdir() if p.name != "last.ckpt"]
    step = read_checkpoint(best)["global_step"]
    assert step in (3, 6)
    assert losses[step] == min(losses[3], losses[6])
    assert read_checkpoint(root / "checkpoints" / "last.ckpt")["global_step"] == 7


def test_activation_checkpointing_changes_nothing_but_memory(
    cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    digests = []
    for on in (False, True):
        config = tiny_run()
        root = set_root(config, tmp_path / f"checkpointing{on}")
        config["model"]["init_args"]["gradient_checkpointing"] = on
        cli("fit", config)
        digests.append(digest(root))
    assert digests[0] == digests[1]


def test_a_diverged_step_ends_the_run(
    cli: Callable, tiny_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(recipe="none", dtype="fp32", rows="all")
    config["model"]["init_args"]["optimizer"] = {
        "class_path": "torch.optim.SGD",
        "init_args": {"lr": 1e30},
    }
    config["report"]["sample_answer"] = False
    with pytest.raises(SystemExit) as error:
        cli("fit", config)
    assert error.value.code == 2
    assert "the gradient is not finite at step" in capsys.readouterr().err


def test_the_last_step_is_always_saved(cli: Callable, tiny_run: Callable) -> None:
    config = tiny_run()
    config["checkpoint"]["every_n_train_steps"] = 100
    for flags in (["--trainer.max_steps=5"], ["--trainer.max_steps=-1", "--trainer.max_epochs=1"]):
        cli("fit", config, *flags)
        root = Path(config["trainer"]["default_root_dir"])
        last = read_checkpoint(root / "checkpoints" / "last.ckpt")
        assert last["global_step"] == len([r for r in rows(root) if r["train/loss"]])


def test_validate_test_and_predict(cli: Callable, tiny_run: Callable) -> None:
    config = tiny_run()
    fit = cli("fit", config)
    root = Path(config["trainer"]["default_root_dir"])
    before = rows(root)
    validated = cli("validate", config, "--ckpt_path=last")
    loss = float(validated.trainer.callback_metrics["val/loss"])
    assert loss == float(fit.trainer.callback_metrics["val/loss"])
    tested = cli("test", config, "--ckpt_path=last")
    assert float(tested.trainer.callback_metrics["test/loss"]) == loss
    cli("predict", config, "--ckpt_path=last")
    answers = [json.loads(x) for x in (root / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == len(fit.datamodule.val_dataloader().dataset)
    assert set(answers[0]) == {"row", "prompt", "reference", "answer"}
    assert rows(root) == before  # looking at a run does not write into its metrics


def test_flags_and_overlays_reach_the_plugin(
    cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"seed_everything": 7, "checkpoint": {"save_top_k": 0}}))
    config = tiny_run(seed="${seed_everything}")
    result = cli(
        "fit",
        config,
        f"--config={overlay}",
        "--trainer.plugins.init_args.rows=0.5",
        "--trainer.plugins.init_args.rank=8",
        "--trainer.max_steps=1",
    )
    plugin = result.trainer.precision_plugin
    assert (plugin.update.rows, plugin.melding.rank, plugin.update.seed) == (0.5, 8, 7)
    assert next(iter(plugin.layers.values())).B.shape[1] == 8


def test_inspect_reads_a_checkpoint(
    cli: Callable, tiny_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run()
    cli("fit", config)
    root = config["trainer"]["default_root_dir"]
    capsys.readouterr()
    assert falqon_command(["inspect", root]) == 0
    printed = capsys.readouterr().out
    for part in ("FALQON", digest(root), "lm_head", "14"):
        assert part in printed


def test_a_full_disk_leaves_the_old_checkpoint(tiny_run: Callable, tmp_path: Path) -> None:
    # A limit on file size stands in for a full disk: the last checkpoint of the first run fits,
    # those of the second, which is resumed under the limit, do not.
    config = tiny_run()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "limit = int(sys.argv.pop(1));"
        "limit and resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit));"
        "import runpy; sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", script]
    common = ["fit", "--config", str(path)]

    def start(limit: int, flag: str) -> subprocess.CompletedProcess[str]:
        arguments = [*command, str(limit), *common, flag]
        return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)

    first = start(0, "--trainer.max_steps=3")
    assert first.returncode == 0, first.stderr
    checkpoint = Path(config["trainer"]["default_root_dir"]) / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    second = start(65536, "--ckpt_path=last")
    assert second.returncode == 2, second.stderr
    assert "last.ckpt" in second.stderr
    assert "Traceback" not in second.stderr
    assert checkpoint.read_bytes() == before
    assert os.listdir(checkpoint.parent) == ["last.ckpt"]


def test_deterministic_runs_do_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    switches: Any = torch.utils.deterministic
    monkeypatch.setattr(switches, "fill_uninitialized_memory", True)
    seen = []

    def stop(*args: Any, **kwargs: Any) -> None:
        seen.append(switches.fill_uninitialized_memory)
        raise InputError("enough")

    monkeypatch.setattr(training, "FalqonCLI", stop)
    with pytest.raises(SystemExit):
        training.run([])
    assert seen == [False]
    assert switches.fill_uninitialized_memory is True
