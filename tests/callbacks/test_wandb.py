"""W&B without an account and without a network: modes, the run's id, and the file it writes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from falqon.callbacks import WandbSettings, make_wandb_logger
from falqon.callbacks.wandb_logger import ID_FILE
from falqon.errors import InputError
from tests.wandb_file import records


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def mode_of(settings: WandbSettings, save_dir: Path) -> str:
    logger = make_wandb_logger(settings, save_dir, resume=False)
    return "disabled" if logger is None else logger._wandb_init["mode"]


def logged(directory: Path) -> list[dict[str, Any]]:
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
        for items in (r.history.item for r in records(directory) if r.HasField("history"))
    ]


def run_record(directory: Path) -> Any:
    return next(record.run for record in records(directory) if record.HasField("run"))


# ------------------------------------------------------------- modes


def test_auto_is_offline_without_an_account(tmp_path: Path) -> None:
    assert mode_of(WandbSettings(), tmp_path) == "offline"


@pytest.mark.parametrize("how", ["key", "netrc", "token"])
def test_auto_is_online_with_an_account(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "key":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    elif how == "token":
        monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "token.jwt")
    else:
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
    assert mode_of(WandbSettings(), tmp_path) == "online"


def test_an_account_elsewhere_is_none_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert mode_of(WandbSettings(), tmp_path) == "offline"
    (tmp_path / "netrc").write_text("machine wandb.example.org login u password " + "x" * 40)
    assert mode_of(WandbSettings(), tmp_path) == "online"
    (tmp_path / "netrc").write_text("not a netrc file")
    assert mode_of(WandbSettings(), tmp_path) == "offline"


@pytest.mark.parametrize(
    ("wanted", "environment", "result"),
    [
        ("auto", "online", "online"),
        ("auto", "offline", "offline"),
        ("auto", "dryrun", "offline"),
        ("auto", "disabled", "disabled"),
        ("online", "offline", "offline"),
        ("online", "disabled", "disabled"),
        ("offline", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "", "online"),
        ("disabled", "", "disabled"),
    ],
)
def test_the_environment_may_restrict(
    wanted: Any, environment: str, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", environment)
    assert mode_of(WandbSettings(mode=wanted), tmp_path / "run") == result
    assert (tmp_path / "run").exists() is (result != "disabled")


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"wandb mode 'of' does not exist.*offline"):
        WandbSettings(mode="of")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="project is empty"):
        WandbSettings(project="")
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(InputError, match="WANDB_MODE='of'"):
        make_wandb_logger(WandbSettings(), tmp_path, resume=False)
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"{ID_FILE} cannot be written"):
        make_wandb_logger(WandbSettings(), tmp_path / "file", resume=False)


# ------------------------------------------------------------- the run's id


def test_resuming_keeps_the_id_and_starting_does_not(tmp_path: Path) -> None:
    def version(resume: bool) -> str | None:
        logger = make_wandb_logger(WandbSettings(), tmp_path, resume=resume)
        assert logger is not None
        return logger.version

    first = version(resume=True)  # nothing to resume: a new one
    assert first
    assert version(resume=True) == first
    second = version(resume=False)
    assert second not in (None, first)
    assert version(resume=True) == second


def test_other_ranks_leave_the_id_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = make_wandb_logger(WandbSettings(), tmp_path / "run", resume=False)
    assert logger is not None
    logger.log_metrics({"a": 1.0}, 0)
    assert not (tmp_path / "run").exists()


def test_offline_run_and_its_continuation(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = WandbSettings(name="first", group="g", entity="team", tags=["a", "b"])
    root = tmp_path / "run"
    for part in range(2):
        time.sleep(1.1 * part)  # wandb names directories by the second
        logger = make_wandb_logger(settings, root, resume=part > 0)
        assert logger is not None
        logger.log_hyperparams({"rank": 8})
        logger.log_metrics({"loss": 2.0 - part, "val/loss": float("nan")}, step=part)
        logger.experiment.finish()
        assert "WANDB_MODE" not in os.environ
        assert wandb.run is None
    kept = (root / "wandb" / ID_FILE).read_text().strip()
    parts = sorted((root / "wandb").glob(f"offline-run-*-{kept}"))
    assert len(parts) == 2
    history = [row for directory in parts for row in logged(directory)]
    for directory in parts:
        run = run_record(directory)
        assert run.run_id == kept
        assert (run.project, run.display_name, run.run_group) == ("falqon", "first", "g")
        assert list(run.tags) == ["a", "b"]
    assert [row["trainer/global_step"] for row in history] == [0, 1]
    assert [row["loss"] for row in history] == [2.0, 1.0]
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert list(Path.cwd().iterdir()) == []
