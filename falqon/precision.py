"""FalqonPrecision: the Lightning plugin that melds a model and writes its FP8 weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypedDict

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.profiler import record_function
from typing_extensions import override

from falqon.checkpoint import changes
from falqon.checkpoint.base import BaseHash, hash_base
from falqon.checkpoint.hashing import hash_tensors
from falqon.errors import InputError
from falqon.fp8 import all_finite
from falqon.kernels import devices
from falqon.linear import MeldedLinear
from falqon.meld import MeldReport, meld, melded_layers, targets
from falqon.parallel.layers import ShardedLayer, is_part
from falqon.parallel.ordered import order_gradients
from falqon.premeld.directory import MeldedDirectory
from falqon.proxy import ProxyUpdate
from falqon.recipe import (
    DEFAULT_PRESET,
    Adapter,
    Fp8Recipe,
    MeldRecipe,
    Rounding,
    UpdateRecipe,
    as_plain,
    fp8_recipe,
    update_recipe,
)
from falqon.scaling import DelayedScaling

STATE_VERSION = 3
READS_VERSIONS = (2, 3)  # before 3 a checkpoint always held all weights


class PluginState(TypedDict):
    """What the plugin puts into a checkpoint; plain containers and tensors."""

    version: int
    settings: dict[str, Any]
    skipped: dict[str, str]
    steps: int
    scaling: dict[str, Any]
    proxy: dict[str, Any]
    originals: str
    base: dict[str, Any] | None


class FalqonPrecision(Precision):
    """FP8 training with melded adapters (arXiv:2510.24061) as a Lightning Precision plugin.

    Give it to the Trainer as `plugins` and leave `precision` unset. It melds the model in place,
    computes everything that is not melded in `dtype`, and after every optimizer step (after
    gradient accumulation and clipping, before the scheduler, checkpoints and validation) writes
    rows of the proxy buffers into the FP8 codes.

    Args:
        rank: adapter rank r.
        update: policy of the proxy update: a name in `falqon.recipe.PRESETS`, or fields of
            `UpdateRecipe` that differ from the one named `preset`.
        rows: rows written in each layer and step: a number, `rank`, `all`, or a fraction in (0, 1);
            the preset's own if None.
        recipe: FP8 recipe: a name (`default`, `paper`, `none`), or fields of `Fp8Recipe` that
            differ from the one named `base`.
        rounding: of the written codes, `nearest` or `stochastic`; the policy's own if None.
        lora_alpha: multiply B A by lora_alpha / rank, as LoRA does; None multiplies by 1, as the
            paper does.
        adapter: where A comes from, see `falqon.recipe.MeldRecipe`.
        include: patterns of the linear layers to meld.
        exclude: patterns of linear layers to leave in `dtype`, beside the output embedding.
        output_embedding: meld the output embedding (lm_head) as well.
        svd: `randomized` or `full`.
        groups: run q/k/v and gate/up as one layer each, see `falqon.recipe.MeldRecipe`.
        keep_transposed: on a GPU, keep the codes transposed for the backward pass as well: one more
            byte a weight, faster with few tokens a step; the same numbers. See docs/kernels.md.
        dtype: of everything that is not melded. Norms and the loss compute in float32 inside.
        seed: of the randomised SVD and of stochastic rounding.

    Raises:
        InputError: for an unknown name or a value out of range.
    """

    precision: Literal["bf16-true"] = "bf16-true"

    def __init__(
        self,
        rank: int = 64,
        update: str | dict[str, Any] = DEFAULT_PRESET,
        rows: int | float | str | None = None,
        recipe: str | dict[str, Any] | Fp8Recipe = "default",
        rounding: Rounding | None = None,
        lora_alpha: float | None = None,
        adapter: Adapter = "svd_weight",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        output_embedding: bool = False,
        svd: Literal["randomized", "full"] = "randomized",
        groups: bool = True,
        keep_transposed: bool = False,
        dtype: Literal["bf16", "fp32"] = "bf16",
        seed: int = 0,
    ) -> None:
        self.fp8 = fp8_recipe(recipe)
        self.melding = MeldRecipe(
            rank=rank,
            include=MeldRecipe.include if include is None else tuple(include),
            exclude=MeldRecipe.exclude if exclude is None else tuple(exclude),
            output_embedding=output_embedding,
            adapter=adapter,
            lora_alpha=lora_alpha,
            svd=svd,
            seed=seed,
            groups=groups,
        )
        changes: dict[str, Any] = {} if rounding is None else {"rounding": rounding}
        if not (isinstance(update, dict) and "seed" in update):
            changes["seed"] = seed
        self.update = update_recipe(update, rows, **changes)
        if dtype not in ("bf16", "fp32"):
            raise InputError(f"dtype is {dtype!r}; choose bf16 or fp32.")
        self.dtype_name = dtype
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        if keep_transposed and self.fp8.emulate != "fp8":
            raise InputError("keep_transposed is for FP8 matmuls, which this recipe has not.")
        self.keep_transposed = keep_transposed
        self.report: MeldReport | None = None
        self.layers: dict[str, MeldedLinear] = {}
        self.proxy_update: ProxyUpdate | None = None
        self.scaling: DelayedScaling | None = None
        self.steps = 0
        self._originals_hash = ""
        self.base: BaseHash | None = None
        self._module: nn.Module | None = None

    # -- converting ---------------------------------------------------------------------------

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Meld a module in place; melded layers are left as they are, so it may be called again.

        Raises:
            InputError: as `falqon.meld.meld` does.
        """
        return self.convert(module)

    def convert(
        self,
        module: nn.Module,
        device: torch.device | str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        premelded: MeldedDirectory | None = None,
        store: torch.device | str | None = None,
    ) -> nn.Module:
        """`convert_module` with a place for the melded layers and a progress callback.

        Call it in `LightningModule.configure_model`: a checkpoint is loaded right after that, and
        needs the melded parameters.

        Args:
            module: model or LightningModule, changed in place.
            device: where to meld each layer; the layer's own device if None.
            progress: see `falqon.meld.meld`.
            premelded: the directory that the module's melded layers come from.
            store: where to put melded layers in the end; where they were computed if None.

        Raises:
            InputError: for a device that the kernels cannot run on, a directory that was melded
                with other settings or lacks original weights which the policy needs, and as
                `falqon.meld.meld` does.
        """
        if device is not None:
            devices.check(torch.device(device))
        check_rows(module, self.update, self.melding)
        weights: dict[str, Tensor] = {}
        if premelded is not None:
            premelded.check_settings(self.fp8, self.melding, self.dtype_name)
            weights = premelded.originals(self.update)

        def keep(name: str, weight: Tensor) -> None:
            weights[name] = weight.cpu()  # in host memory, as soon as its layer is melded

        report = meld(
            module,
            self.fp8,
            self.melding,
            device=device,
            progress=progress,
            keep=keep if self.update.written == "weights" else None,
            store=store,
        )
        if premelded is not None:
            report = replace(
                premelded.report(), grouped=report.grouped, not_grouped=report.not_grouped
            )
        if self.report is None or report.converted:
            self.report = report
        layers = melded_layers(module)
        own = {id(p) for layer in layers.values() for p in (layer.codes, layer.scale, layer.B)}
        for name, parameter in module.named_parameters():
            # Parameters only: buffers such as rotary frequencies keep their precision.
            if id(parameter) not in own and parameter.is_floating_point():
                if report.converted and not all_finite(parameter):
                    raise InputError(
                        f"{name} holds NaN or infinity; the checkpoint is damaged or was saved "
                        "from a diverged run. Use another checkpoint."
                    )
                parameter.data = parameter.data.to(self.dtype)
        if list(layers.values()) != list(self.layers.values()):
            self.layers = layers
            self.steps = 0
            self._originals_hash = ""
            self.base, self._module = None, module
            # Originals in a file stay there: locking them into memory would make a second copy.
            self.proxy_update = ProxyUpdate(layers, self.update, weights, pin=premelded is None)
            self.scaling = DelayedScaling(module, self.fp8.amax_history)
            for layer in layers.values():
                layer.backbone_matmul.keep_transposed = self.keep_transposed
        return module

    def shard(self) -> None:
        """Go on with layers that are cut up over ranks by now; call it right after that is done.

        Raises:
            InputError: for an update policy that needs whole rows.
        """
        update = self.proxy_update
        if update is None or update.is_sharded or not any(map(is_part, self.layers.values())):
            return
        self._hash_originals()  # while they are whole
        update.shard({name: ShardedLayer(layer) for name, layer in self.layers.items()})
        if self.scaling is not None:
            self.scaling.move(next(iter(self.layers.values())).scale)

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Check that training can work before it starts.

        Raises:
            InputError: if a proxy buffer is in no optimizer, for a device that the kernels cannot
                run on, or for transposed copies of sharded codes.
        """
        self.shard()
        for name, layer in self.layers.items():
            devices.check(layer.codes.device)
            if self.keep_transposed and isinstance(layer.codes, DTensor):
                raise InputError(
                    f"keep_transposed keeps whole weights, and the codes of {name} are sharded: "
                    "set it to false, or use a strategy that does not shard (ddp)."
                )
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        orphans = [name for name, layer in self.layers.items() if id(layer.B) not in held]
        if optimizers and (orphans or not self.layers):
            raise InputError(
                f"the proxy buffer B of {orphans[0]} (and of {len(orphans) - 1} more layers) is in "
                "no optimizer, so it would never be trained: create the optimizer in "
                "configure_optimizers, from the parameters that require a gradient."
                if orphans
                else "the model has no melded layer: call FalqonPrecision.convert in "
                "configure_model."
            )
        order_gradients(model)
        return super().connect(model, optimizers, lr_schedulers)

    @override
    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors of a batch in `dtype`."""
        return apply_to_collection(
            data, torch.Tensor, lambda x: x.to(self.dtype) if x.is_floating_point() else x
        )

    # -- training -----------------------------------------------------------------------------

    @override
    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: Optimizer,
        model: LightningModule,
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        """Step the optimizer, then write what it changed in B into the FP8 codes."""
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        assert self.proxy_update is not None
        assert self.scaling is not None
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        with record_function("falqon::update"):
            self.proxy_update.step(self.steps, only=held)
            self.scaling.advance()
        self.steps += 1
        return result

    def metrics(self) -> dict[str, float]:
        """Statistics of the last update, by metric name; waits for the device.

        `falqon/rows_written`, `codes_flipped`, `codes_flipped_share`, `realised_ratio`,
        `saturated_share`, `pending_norm`, `staleness` (see `falqon.proxy.UpdateStatistics`),
        `weight_scale` (geometric mean),
        and with delayed scaling `scale_e4m3`, `scale_e5m2` and `overflowed`.
        """
        statistics = self.proxy_update.statistics() if self.proxy_update else None
        if statistics is None or self.scaling is None:
            return {}
        logs: dict[str, float] = {k: float(v) for k, v in vars(statistics).items()}
        scales = torch.stack([layer.scale.detach()[0] for layer in self.layers.values()])
        logs["weight_scale"] = float(scales.log2().mean().exp2())
        logs |= self.scaling.statistics()
        return {f"falqon/{name}": value for name, value in logs.items()}

    def flush(self, calibrate: Callable[[], None] | None = None) -> None:
        """Write all that is pending: the weights are then those that would be served.

        Args:
            calibrate: runs the model on some training data; needed with `flush_rounding:
                compensated`, where all ranks have to run it on the same.

        Raises:
            InputError: if it is needed and not there.
        """
        if self.is_pending():
            assert self.proxy_update is not None
            self.proxy_update.flush(self.steps, calibrate)

    def is_pending(self) -> bool:
        """Something learned is not in the codes yet; waits for the device."""
        return self.proxy_update is not None and self.proxy_update.is_pending()

    # -- state --------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """All settings as plain containers: what a checkpoint records and a resume must match."""
        meld_settings = as_plain(self.melding)
        update = as_plain(self.update)
        return {
            "rank": meld_settings.pop("rank"),
            "update": update.pop("preset"),
            "rows": update.pop("rows"),
            "rounding": update.pop("rounding"),
            "seed": update.pop("seed"),
            "dtype": self.dtype_name,
            "recipe": as_plain(self.fp8),
            "meld": meld_settings,
            "policy": update,
        }

    def remember_base(self) -> None:
        """Hash the model as it starts, once; small checkpoints hold what changes after that.

        Sharded weights are not hashed, and their checkpoints hold all of them.
        """
        sharded = any(isinstance(layer.codes, DTensor) for layer in self.layers.values())
        if self.base is None and self._module is not None and self.layers and not sharded:
            self._hash_originals()  # now, so that the first checkpoint does not wait for it
            self.base = hash_base(self._module, self.layers)

    def pack_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint small, see `falqon.checkpoint.changes`.

        Call it in `LightningModule.on_save_checkpoint`, `remember_base` in `configure_model` and
        `unpack_checkpoint` in `on_load_checkpoint`. Without that checkpoints hold all weights.

        Args:
            checkpoint: what Lightning collected, changed in place.
        """
        if self.base is not None and self._module is not None and self.proxy_update is not None:
            changes.pack(checkpoint, self._module, self.layers, self.proxy_update.states)

    def unpack_checkpoint(
        self, checkpoint: dict[str, Any], module: nn.Module, where: str = "the checkpoint"
    ) -> None:
        """Make a small checkpoint whole again, from a model that has just been melded.

        Args:
            checkpoint: as it was read, changed in place.
            module: the LightningModule.
            where: how to name the checkpoint.

        Raises:
            InputError: if it was trained from another model, or does not fit together.
        """
        assert self.proxy_update is not None
        self.remember_base()
        states = self.proxy_update.states
        changes.unpack(checkpoint, module, self.layers, states, self.base, where)

    @override
    def state_dict(self) -> PluginState:  # type: ignore[override]
        """Settings, step counter, amax histories, and what the update policy keeps."""
        return {
            "version": STATE_VERSION,
            "settings": self.settings(),
            "skipped": dict(self.report.skipped) if self.report else {},
            "steps": self.steps,
            "scaling": self.scaling.state_dict() if self.scaling else {},
            "proxy": self.proxy_update.state_dict() if self.proxy_update else {},
            "originals": self._hash_originals(),
            "base": self.base.plain() if self.base else None,
        }

    @override
    def load_state_dict(self, state_dict: PluginState) -> None:  # type: ignore[override]
        """Restore what `state_dict` gave.

        Raises:
            InputError: if the checkpoint was made with other settings, or from another model than
                rows would be derived from.
        """
        self.check_settings(state_dict)
        ours, theirs = self._hash_originals(), state_dict["originals"]
        if ours != theirs:
            raise InputError(
                "the model that was loaded is not the one this checkpoint was trained from: its "
                f"weights have the hash {ours[:12]}, the checkpoint's {theirs[:12]}. Give the same "
                "model (and revision)."
            )
        self.steps = state_dict["steps"]
        if self.scaling is not None and state_dict["scaling"]:
            self.scaling.load_state_dict(state_dict["scaling"])
        if self.proxy_update is not None and state_dict["proxy"]:
            self.proxy_update.load_state_dict(state_dict["proxy"])

    def _hash_originals(self) -> str:
        """SHA-256 over what rows are derived from, which never changes; empty if there is none."""
        originals = self.proxy_update.originals() if self.proxy_update else {}
        if originals and not self._originals_hash:
            self._originals_hash = hash_tensors(originals)
        return self._originals_hash if originals else ""

    def check_settings(self, state: PluginState | None, where: str = "the checkpoint") -> None:
        """Compare a checkpoint's settings with this plugin's.

        Args:
            state: the plugin's entry in a checkpoint, None if there is none.
            where: how to name the checkpoint.

        Raises:
            InputError: naming every setting that differs, or if there is no entry.
        """
        if state is None:
            raise InputError(
                f"{where} was not trained with FalqonPrecision and cannot be resumed with it."
            )
        if state.get("version") not in READS_VERSIONS:
            raise InputError(
                f"{where} has plugin state version {state.get('version')}, this release reads "
                f"versions {READS_VERSIONS}: use the release that wrote it."
            )
        theirs, ours = _flatten(state["settings"]), _flatten(self.settings())
        differing = [
            f"{key} (checkpoint {theirs.get(key)!r}, configuration {ours.get(key)!r})"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        if differing:
            raise InputError(
                f"{where} was made with another recipe: {'; '.join(differing)}. Give these "
                "settings as the checkpoint has them, or start a new run without ckpt_path."
            )


def check_rows(module: nn.Module, recipe: UpdateRecipe, melding: MeldRecipe | None = None) -> None:
    """Refuse a number of rows that no layer has which is melded or going to be.

    Args:
        module: the model.
        recipe: the policy.
        melding: which layers are going to be melded, all by default.

    Raises:
        InputError: naming the largest number possible.
    """
    sizes = [layer.out_features for layer in melded_layers(module).values()]
    sizes += [linear.out_features for linear in targets(module, melding or MeldRecipe()).values()]
    if sizes and isinstance(recipe.rows, int) and recipe.rows > max(sizes):
        raise InputError(
            f"rows is {recipe.rows}, but the largest melded layer has {max(sizes)} rows; use at "
            f"most {max(sizes)}, 'rank', 'all' or a fraction."
        )


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
