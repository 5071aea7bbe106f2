"""What the proxy update does to the FP8 weights: metrics of every logged step, and one plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from falqon.callbacks.throughput import is_log_step
from falqon.precision import FalqonPrecision

_MANY = 12  # kinds of layers that the plot tells apart


class ProxyMonitor(Callback):
    """Logs `FalqonPrecision.metrics`, and draws `<default_root_dir>/landed.png` at the end.

    The plot has a point for each layer: how long the change was that the optimizer wanted, over the
    run, and how much of it landed in the FP8 codes. W&B gets it as `falqon/landed`.

    Args:
        plot: Draw it.
    """

    def __init__(self, plot: bool = True) -> None:
        self.plot = plot

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        plugin = trainer.precision_plugin
        if isinstance(plugin, FalqonPrecision) and is_log_step(trainer):
            pl_module.log_dict(plugin.metrics())

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plugin = trainer.precision_plugin
        if (
            not self.plot
            or not trainer.is_global_zero
            or trainer.fast_dev_run  # type: ignore[attr-defined]
            or not isinstance(plugin, FalqonPrecision)
            or plugin.proxy_update is None
        ):
            return
        path = Path(trainer.default_root_dir) / "landed.png"
        plot_landed(plugin.proxy_update.lengths_by_layer(), path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("falqon/landed", [str(path)])


def plot_landed(lengths: dict[str, tuple[float, float]], path: str | Path) -> None:
    """Draw landed against wanted change, one point a layer; the file is written whole or not.

    Args:
        lengths: see `falqon.proxy.ProxyUpdate.lengths_by_layer`.
        path: PNG file.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once a run

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, point in lengths.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(point)
    if len(kinds) > _MANY:
        kinds = {"all layers": list(lengths.values())}
    for kind, points in sorted(kinds.items()):
        wanted, landed = zip(*points, strict=True)
        axes.scatter(wanted, landed, s=12, label=kind)
    most = max((wanted for wanted, _ in lengths.values()), default=0.0) or 1.0
    axes.plot([0, most], [0, most], color="gray", linewidth=1, label="all of it lands")
    axes.set_xlabel("wanted change of a layer's weights (norm over all writes)")
    axes.set_ylabel("what landed of it in FP8")
    axes.legend(fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".png.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
