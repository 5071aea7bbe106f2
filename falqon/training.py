"""The command line of `train.py`: LightningCLI with what every FALQON run has."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.utils.deterministic
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from falqon.callbacks import MetricsCSV, WandbSettings, archive_previous_run, make_wandb_logger
from falqon.callbacks.predictions import PredictionFile
from falqon.callbacks.progress_bar import ProgressBar
from falqon.callbacks.proxy_monitor import ProxyMonitor
from falqon.callbacks.rank_checksum import RankChecksum
from falqon.callbacks.report import RunReport
from falqon.callbacks.run_checkpoint import RunCheckpoint
from falqon.callbacks.run_dir import TEST_FILE, restore_archived_run
from falqon.callbacks.task_evaluation import TaskEvaluation
from falqon.callbacks.throughput import Throughput
from falqon.checkpoint import LAST, SERVED, BackgroundCheckpointIO, read_header
from falqon.checkpoint.sharded import recover
from falqon.errors import InputError
from falqon.files import write_text
from falqon.parallel.lost import RankLost, RankWatch, explain, is_restarted, separate_attempts
from falqon.parallel.strategies import refuse
from falqon.precision import FalqonPrecision


class RunConfig(SaveConfigCallback):
    """Writes the resolved configuration to `<default_root_dir>/config.yaml` and to the loggers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["save_to_log_dir"] = False
        super().__init__(*args, **kwargs)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        config = self.config.clone()
        config.ckpt_path = None  # where this run went on; the next one from this file need not
        text = self.parser.dump(config, skip_none=False)
        path = Path(trainer.default_root_dir) / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".yaml.tmp")
        temporary.write_text(text)
        temporary.replace(path)
        plain = self.config.as_dict()
        for logger in trainer.loggers:
            logger.log_hyperparams(plain)


class FalqonCLI(LightningCLI):
    """LightningCLI with the run's files, loggers and report.

    Beside `trainer`, `model` and `data` a configuration has `checkpoint` (`RunCheckpoint`),
    `report` (`RunReport`), `evaluation` (`TaskEvaluation`), `rank_checksum` (`RankChecksum`) and
    `wandb` (`WandbSettings`).
    Interpolation (`${seed_everything}`) is resolved once, after all files and flags.
    """

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_lightning_class_args(TaskEvaluation, "evaluation")
        parser.add_lightning_class_args(RankChecksum, "rank_checksum")
        parser.add_class_arguments(WandbSettings, "wandb")
        for source, target in (
            ("model_name", "tokenizer_name"),
            ("revision", "tokenizer_revision"),
            ("trust_remote_code", "trust_remote_code"),
        ):
            parser.link_arguments(f"model.init_args.{source}", f"data.init_args.{target}")

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        # Not a choice: checkpoints are never unpickled.
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    @override
    def _parse_ckpt_path(self) -> None:
        """Check a checkpoint instead of letting its hyperparameters replace what was given."""
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        last = Path(config.trainer.default_root_dir) / LAST
        recover(last)
        if self.config.subcommand == "fit" and is_restarted() and last.exists():
            path = "last"  # whatever it was started from: what it has saved since is newer
        if path is None:
            return
        if path == "last":
            config.ckpt_path = path = str(last)
        if not Path(path).exists() and "://" not in path:
            raise InputError(
                f"ckpt_path {path} does not exist; give a .ckpt file, or leave ckpt_path out to "
                "start a new run."
            )

    @override
    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        for plugin in _as_list(trainer.plugins):
            # Here a mistake in its settings is one sentence; from within jsonargparse it would be
            # one of many reasons why no type of plugin fits.
            if not isinstance(plugin, str) and plugin.get("class_path") == "falqon.FalqonPrecision":
                FalqonPrecision(**plugin.init_args.as_dict())
        strategy = trainer.strategy
        refuse(strategy if isinstance(strategy, str) else str(strategy.get("class_path", "")))
        if trainer.accelerator in ("tpu", "xla"):
            refuse("xla")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        plugins = _as_list(config["plugins"])
        if not any(isinstance(p, CheckpointIO) for p in plugins):
            plugins.append(BackgroundCheckpointIO())
        root = Path(config["default_root_dir"] or os.curdir)
        loggers = [x for x in _as_list(config["logger"]) if isinstance(x, Logger)]
        step = self._resume_step(plugins, root)
        if self.subcommand == "fit" and not config["fast_dev_run"]:
            if step is None and _holds_run(root):
                self._archived = rank_zero_only(archive_previous_run)(root)
            csv = MetricsCSV(root)
            if step is not None:
                csv.resume_at(step)
            wandb = make_wandb_logger(self._get(self.config_init, "wandb"), root, step is not None)
            loggers = [csv, *loggers, *([wandb] if wandb is not None else [])]
        callbacks = _as_list(config["callbacks"])
        has_bar = any(isinstance(c, LightningProgressBar) for c in callbacks)
        if config["enable_progress_bar"] is not False and not has_bar:
            callbacks.append(ProgressBar())
        kwargs |= {"plugins": plugins, "logger": loggers or False, "callbacks": callbacks}
        return super().instantiate_trainer(**kwargs)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        self._archived = getattr(self, "_archived", None)
        root = Path(self.trainer.default_root_dir)
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            lost = explain(error, str(root / LAST))
            if lost is not None:
                raise lost from error
            self._finish_wandb(exit_code=1)
            if self._archived is not None and not (root / "metrics.csv").exists():
                restore_archived_run(root, self._archived)
            raise
        self._finish_wandb(exit_code=0)

    def _finish_wandb(self, exit_code: int) -> None:
        """Close the W&B run: the next run of this process would write into it."""
        if any(isinstance(logger, WandbLogger) for logger in self.trainer.loggers):
            import wandb

            if wandb.run is not None:
                wandb.finish(exit_code=exit_code)

    def _resume_step(self, plugins: list[Any], root: Path) -> int | None:
        """Step at which this directory's run goes on, after a look at whether the checkpoint fits.

        None for a fresh run, also for one that starts from another run's checkpoint.
        """
        path = self._get(self.config_init, "ckpt_path")
        if path is None or not Path(path).exists():
            return None
        checkpoint = read_header(path)
        for plugin in plugins:
            if isinstance(plugin, FalqonPrecision):
                plugin.check_settings(checkpoint.get("FalqonPrecision"), f"checkpoint {path}")
        if not Path(path).resolve().is_relative_to(root.resolve()):
            return None
        return int(checkpoint["global_step"])

    def after_fit(self) -> None:
        """Validate what would be served, if that has not happened yet, and print the report.

        Pending changes are written into the codes for it; the checkpoints, saved before, hold them
        as pending. The weights after it are saved as `<default_root_dir>/served.ckpt`.
        """
        if self.trainer.fast_dev_run or self.trainer.interrupted:  # type: ignore[attr-defined]
            return
        report = self._get(self.config_init, "report")
        plugin = self.trainer.precision_plugin
        pending = isinstance(plugin, FalqonPrecision) and plugin.is_pending()
        has_validation = self.trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
        if (
            has_validation
            and self.trainer.limit_val_batches
            and (report.last_validated_step != self.trainer.global_step or pending)
        ):
            report.closing = True
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        report.finish(self.trainer, self.model)
        if isinstance(plugin, FalqonPrecision):
            self._save_served(plugin)

    def after_test(self) -> None:
        """Write what `test` found to `<default_root_dir>/test.json`."""
        if not self.trainer.is_global_zero:
            return
        found = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        path = Path(self.trainer.default_root_dir) / TEST_FILE
        report = {"checkpoint": self._get(self.config_init, "ckpt_path"), "metrics": found}
        write_text(path, json.dumps(report, indent=2) + "\n")

    def _save_served(self, plugin: FalqonPrecision) -> None:
        """Save the weights with nothing pending: those that were validated, for `falqon export`."""
        if plugin.is_pending():  # there was no closing validation
            getattr(self.model, "flush", plugin.flush)()
        if hasattr(self.model, "saves_all_weights"):
            self.model.saves_all_weights = True
        # Saved after the loop ended, so it is not to be resumed from: hence not in checkpoints/.
        path = Path(self.trainer.default_root_dir) / SERVED
        self.trainer.save_checkpoint(path, weights_only=False)
        self.trainer.strategy.checkpoint_io.teardown()  # until it is written


def _holds_run(root: Path) -> bool:
    return (root / "metrics.csv").is_file() or (root / LAST).exists()


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def run(args: list[str] | None = None) -> FalqonCLI:
    """Parse the command line and do what it says.

    A mistake in what the user gave is printed as one line, and the process exits with status 2.

    Args:
        args: instead of the process's own arguments.

    Returns:
        The finished CLI, with its `trainer`, `model` and `datamodule`.
    """
    separate_attempts()
    # With `deterministic: true` torch would fill whatever it allocates before it is written, which
    # takes a tenth of a step and helps those alone who read what they have not written.
    switches: Any = torch.utils.deterministic
    before, switches.fill_uninitialized_memory = switches.fill_uninitialized_memory, False
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    try:
        return FalqonCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            trainer_defaults={
                "default_root_dir": "runs/default",
                "use_distributed_sampler": False,
                "num_sanity_val_steps": -1,
                "callbacks": [Throughput(), ProxyMonitor(), PredictionFile(), RankWatch(LAST)],
            },
            parser_kwargs={"parser_mode": "omegaconf+"},
            auto_configure_optimizers=False,
        )
    except RankLost as error:
        if error.is_first:
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the usual way out waits for the others
    except InputError as error:
        sys.exit(_fail(error))
    finally:
        switches.fill_uninitialized_memory = before


def _fail(error: InputError) -> int:
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(f"train.py: error: {error}", file=sys.stderr)
    return 2
