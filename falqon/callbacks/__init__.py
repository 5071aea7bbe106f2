"""What is recorded about a run, and where its files go."""

from falqon.callbacks.csv_logger import MetricsCSV
from falqon.callbacks.run_dir import archive_previous_run
from falqon.callbacks.wandb_logger import WandbSettings, make_wandb_logger

__all__ = ["MetricsCSV", "WandbSettings", "archive_previous_run", "make_wandb_logger"]
