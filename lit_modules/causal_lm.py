"""A causal language model: trained on supervised tokens, validated, and asked to answer."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import AdamW
from torch.profiler import record_function
from transformers import PreTrainedModel

from falqon.errors import InputError
from falqon.generation.answers import Sampling, answer
from falqon.groups import untied
from falqon.parallel.exact import ExactSums, rows_of, unit_gradient
from falqon.parallel.norm import total_norm
from falqon.parallel.sharding import parallelize
from falqon.parallel.strategies import (
    data_parallel_group,
    data_parallel_size,
    is_sharding,
    prepare,
)
from falqon.precision import FalqonPrecision
from falqon.premeld.directory import MeldedDirectory, open_melded
from falqon.premeld.load import load_melded
from falqon.pretrained import load_model, resolve
from lit_modules.divergence import DivergenceGuard
from lit_modules.layers import arrange
from lit_modules.loss import supervised_loss
from lit_modules.methods import Falqon, Method
from lit_modules.methods import state as method_state
from lit_modules.passes import calibrate, check_calibration, held_out_loss
from lit_modules.schedules import WarmupConstant


class LitCausalLM(LightningModule):
    """Fine-tunes a Hugging Face causal LM: with FALQON, or with a method to compare it with.

    FALQON is `FalqonPrecision` in the Trainer's plugins: the model is melded into FP8 when it is
    loaded. Any other method is given as `method`, and the Trainer then has no such plugin.

    The loss is the mean over supervised tokens of the whole optimizer step: over the batch,
    accumulated batches and devices alike, whatever their share of supervised tokens.

    Logs `train/loss`, `grad_norm` (before clipping) and `lr` for every optimizer step, `val/loss`
    and `val/perplexity`, `test/loss` and `test/perplexity`.

    Checkpoints hold what `FalqonPrecision` changed, unless `saves_all_weights` is set.

    Args:
        model_name: Where the model is: a hub id, a local directory, a GGUF file,
            `package:NAME` for a model inside an installed Python package, or a directory that
            `falqon meld` wrote.
        optimizer: From parameters to an optimizer.
        lr_scheduler: From an optimizer to a scheduler, stepped once an optimizer step.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        activation_gib: GiB that the decoder layers may keep for the backward pass; so many of them
            as do not fit are recomputed (`lit_modules.layers.ActivationBudget`).
        compile_layers: `torch.compile` each decoder layer for training. On a CPU it helps other
            methods, and slows FALQON down; it was not tried on a GPU.
        attn_implementation: Attention of transformers: `sdpa`, `eager`, `flash_attention_2` ...
        compare_with_base: Measure the validation loss of the untuned model before it is melded. It
            is then on the device in its own precision for a moment.
        max_new_tokens: Longest answer of generation.
        temperature: Of sampling in generation; 0 takes the most likely token.
        exact_sums: Make a step's gradient independent, to the last bit, of how its rows are split
            over devices and accumulated batches: rows run one by one, and their gradients are added
            as integers. Slow; to compare runs. Needs `FalqonPrecision`.
        trust_remote_code: Run code that comes with the model. Only for sources you trust.
        revision: Branch, tag or commit on the hub.
        method: How it is trained, one of `lit_modules.methods`; FALQON if None.
    """

    def __init__(
        self,
        model_name: str,
        optimizer: OptimizerCallable = lambda params: AdamW(
            params, lr=2e-4, weight_decay=0.0, fused=True
        ),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: WarmupConstant(
            optimizer, warmup=0.03
        ),
        gradient_checkpointing: bool = False,
        activation_gib: float | None = None,
        compile_layers: bool = False,
        attn_implementation: str = "sdpa",
        compare_with_base: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        exact_sums: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        method: Method | None = None,
    ) -> None:
        super().__init__()
        Sampling(max_new_tokens, temperature)  # refuses what is out of range
        self.model_name = model_name
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        if activation_gib is not None and (gradient_checkpointing or activation_gib <= 0):
            raise InputError(
                f"activation_gib {activation_gib} has to be positive, and replaces "
                "gradient_checkpointing, which keeps nothing: set that to false."
            )
        self.gradient_checkpointing = gradient_checkpointing
        self.activation_gib = activation_gib
        self.compile_layers = compile_layers
        self.attn_implementation = attn_implementation
        self.compare_with_base = compare_with_base
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.exact_sums = exact_sums
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.method = method or Falqon()
        self.model: PreTrainedModel | None = None
        self.base_loss: float | None = None
        self.saves_all_weights = False
        self._sums: dict[str, Tensor] = {}
        self._frozen = ""  # hash of what training does not change; see `method_state`
        self._exact: ExactSums | None = None
        self._guard = DivergenceGuard()

    # -- setting up ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what would fail or go wrong later.

        Raises:
            InputError: for a method and a plugin that do not go together, for flash attention with
                packed batches of several rows (it would not keep documents apart), for a
                compensated flush without training examples to look at, for a strategy that cannot
                work, and for one that shards with layers that are compiled or have a budget.
        """
        prepare(self.trainer.strategy)
        if is_sharding(self.trainer.strategy) and (self.activation_gib or self.compile_layers):
            raise InputError(
                "activation_gib and compile_layers are for one device or ddp: with a strategy that "
                "shards, use gradient_checkpointing."
            )
        self.method.check(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        plugin = self.trainer.precision_plugin
        if stage == "fit" and isinstance(plugin, FalqonPrecision):
            check_calibration(plugin, self.trainer)
        elif stage == "fit" and self.exact_sums:
            raise InputError(
                "exact_sums adds gradients of melded layers: use it with falqon.FalqonPrecision, "
                "or set model.exact_sums to false."
            )
        if getattr(data, "packing", False) and "flash" in self.attn_implementation:
            sizes = {getattr(data, "batch_size", 1), getattr(data, "eval_batch_size", 1)}
            if sizes != {1}:
                raise InputError(
                    f"attn_implementation {self.attn_implementation!r} keeps packed "
                    "documents apart only in batches of one row: set data.init_args.batch_size "
                    "and eval_batch_size to 1 (with a larger max_length), or use sdpa."
                )

    def configure_model(self) -> None:
        """Load the model and prepare it for the method; does nothing the second time."""
        if self.model is not None:
            return
        plugin = self.trainer.precision_plugin
        device = self.method.device = self.trainer.strategy.root_device
        # What is going to be cut up never is on a device as a whole.
        sharding = is_sharding(self.trainer.strategy)
        store = torch.device("cpu") if sharding else None
        premelded = None
        if isinstance(plugin, FalqonPrecision):
            premelded = open_melded(resolve(self.model_name).path)
        with torch.device("cpu"), untied() if sharding else nullcontext():
            if isinstance(plugin, FalqonPrecision) and premelded is not None:
                model = self._load_melded(premelded, plugin, store or device)
            else:
                model = load_model(
                    self.model_name,
                    dtype=self.method.dtype,
                    attn_implementation=self.attn_implementation,
                    trust_remote_code=self.trust_remote_code,
                    revision=self.revision,
                )
            if self.compare_with_base and self._fits_from_start():
                model.to(device)  # type: ignore[arg-type]
                self.base_loss = held_out_loss(model, self.trainer)
                model.to(store or device)  # type: ignore[arg-type]
            if isinstance(plugin, FalqonPrecision):
                plugin.convert(model, device=device, premelded=premelded, store=store)
                rank_zero_info(str(plugin.report))
                if self.trainer.state.fn == "fit" or sharding:
                    plugin.remember_base()
            else:
                model = self.method.prepare(model)  # type: ignore[assignment]
                method_state.check_prepared(self.method, model)
                self.strict_loading = False  # a checkpoint holds what is trained
        compiled = self.compile_layers and self.trainer.state.fn == "fit"
        how = (self.gradient_checkpointing, self.activation_gib, compiled)
        self.method.compiled = arrange(model, *how)
        if sharding:
            self._shard(model, plugin)
        if isinstance(plugin, FalqonPrecision) and self.exact_sums:
            self._exact = ExactSums(plugin.layers)
        model.train()  # Lightning leaves the mode as it is, and from_pretrained gives eval mode
        self.model = model

    def _shard(self, model: PreTrainedModel, plugin: Any) -> None:
        if not isinstance(plugin, FalqonPrecision):
            raise InputError(
                "a strategy that shards is supported with falqon.FalqonPrecision; use ddp."
            )
        parallelize(model, self.trainer.strategy)
        plugin.shard()

    def _load_melded(
        self, directory: MeldedDirectory, plugin: FalqonPrecision, device: torch.device
    ) -> PreTrainedModel:
        """The model of a directory of `falqon meld`, after a look at the settings."""
        if self.compare_with_base and self._fits_from_start():
            raise InputError(
                f"compare_with_base measures the model before it is melded, and {self.model_name} "
                "holds it melded. Set it to false, or name the original model."
            )
        directory.check_settings(plugin.fp8, plugin.melding, plugin.dtype_name)
        return load_melded(
            directory,
            plugin.fp8,
            plugin.melding,
            device=device,
            attn_implementation=self.attn_implementation,
        )

    def _fits_from_start(self) -> bool:
        return self.trainer.state.fn == "fit" and not self.trainer.ckpt_path

    def configure_optimizers(self) -> Any:
        """Optimizer over what is trainable, with its scheduler stepped once an optimizer step."""
        assert self.model is not None
        parameters = list(self.method.trainable(self.model).values())
        optimizer = self.optimizer(parameters)
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupConstant):
            total = self.trainer.estimated_stepping_batches
            if math.isinf(total):
                raise InputError(
                    "a warm-up needs an end of training: set trainer.max_steps or max_epochs, or "
                    "another model.init_args.lr_scheduler."
                )
            scheduler.set_total_steps(int(total))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    # -- training -----------------------------------------------------------------------------

    def forward(self, **inputs: Any) -> Any:
        """The wrapped model's forward."""
        assert self.model is not None
        with self.method.compute():
            return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Summed loss of a batch; `configure_gradient_clipping` divides by the step's tokens."""
        assert self.model is not None
        self.method.before_step(self.model, self.trainer.global_step)
        if self._exact is not None:
            return self._loss_by_row(batch, self._exact)
        loss, tokens = self.method.loss(self.model, batch)
        self._add("train", loss, tokens)
        # Undo what Lightning and DDP will do: divide by accumulated batches, average over ranks.
        return loss * (self.trainer.accumulate_grad_batches * data_parallel_size(self.trainer))

    def _loss_by_row(self, batch: dict[str, Tensor], exact: ExactSums) -> Tensor:
        assert self.model is not None
        losses = []
        for row in rows_of(batch):
            loss, tokens = supervised_loss(self.model, row)
            self._add("train", loss, tokens)
            losses.append(unit_gradient(loss))
        exact.count(len(losses))
        return torch.stack(losses).sum()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Autograd's backward pass, or the method's own."""
        assert self.model is not None
        if not self.method.backward(self.model, loss):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then let the method do what it does after a step."""
        assert self.model is not None
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        with record_function("method::update"):
            self.method.after_step(self.model, step)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Make the gradient that of the mean over the step's supervised tokens, then clip it."""
        sums = self._take("train")
        if sums is None:
            return
        loss, tokens = sums
        if self._exact is not None:
            self._exact.finish(data_parallel_group(self.trainer))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        per_token = tokens.clamp(min=1).reciprocal().to(torch.float32)
        self.method.scale_gradients(parameters, per_token)
        plugin = self.trainer.precision_plugin
        layers = plugin.layers.values() if isinstance(plugin, FalqonPrecision) else ()
        norm = total_norm(parameters, layers)
        mean = loss / tokens.clamp(min=1)
        self._guard.check()
        self._guard.watch(norm, mean, self.trainer.global_step)
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        elif gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        learning_rate = optimizer.param_groups[0]["lr"]
        self.log("train/loss", mean)
        self.log("grad_norm", norm)
        self.log("lr", torch.full_like(norm, learning_rate))  # made there: nothing is sent

    def on_train_end(self) -> None:
        """Refuse a training whose last step has diverged."""
        self._guard.check()

    # -- validation and test ------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Refuse a training that has diverged; outside of training, see `_flush`."""
        self._guard.check()
        self._flush()

    def on_test_start(self) -> None:
        """Evaluate what would be served: see `_flush`."""
        self._flush()

    def on_predict_start(self) -> None:
        """Answer with what would be served: see `_flush`."""
        self._flush()

    def _flush(self) -> None:
        """Write what is pending in the proxy buffers, unless training goes on from here."""
        if self.trainer.state.fn != "fit":
            self.flush()

    def flush(self) -> None:
        """Write what is pending in the proxy buffers: the weights are then what is served.

        Raises:
            InputError: for a compensated flush without training examples to look at, and if the
                training has diverged.
        """
        self._guard.check()
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, FalqonPrecision):
            assert self.model is not None
            plugin.flush(partial(calibrate, self.model, plugin, self.trainer))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch's loss to the sums of `val/loss`."""
        assert self.model is not None
        with self.method.compute():
            self._add("val", *supervised_loss(self.model, batch))

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and `val/perplexity` over all supervised tokens of all devices."""
        self._log_mean("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch's loss to the sums of `test/loss`."""
        assert self.model is not None
        with self.method.compute():
            self._add("test", *supervised_loss(self.model, batch))

    def on_test_epoch_end(self) -> None:
        """Log `test/loss` and `test/perplexity`."""
        self._log_mean("test")

    def _add(self, stage: str, loss: Tensor, tokens: Tensor) -> None:
        sums = torch.stack([loss.detach().double(), tokens.double()])
        self._sums[stage] = self._sums[stage] + sums if stage in self._sums else sums

    def _take(self, stage: str) -> tuple[Tensor, Tensor] | None:
        """Loss and token sums over all ranks since the last call, float64 scalars."""
        sums = self._sums.pop(stage, None)
        if sums is None:
            return None
        group = data_parallel_group(self.trainer)
        loss, tokens = self.trainer.strategy.reduce(sums, group, reduce_op="sum").unbind()
        return loss, tokens

    def _log_mean(self, stage: Literal["val", "test"]) -> None:
        sums = self._take(stage)
        if sums is None or not sums[1]:
            return
        loss = float(sums[0] / sums[1])
        self.log(f"{stage}/loss", loss, prog_bar=stage == "val")
        self.log(f"{stage}/perplexity", math.exp(min(loss, 700.0)))

    # -- generation ---------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, batch: dict[str, Any], max_new_tokens: int | None = None) -> list[str]:
        """Answer prompts.

        Args:
            batch: `input_ids` and `attention_mask`, int64 [b, s], padded on the left.
            max_new_tokens: longest answer; the module's own setting if None.

        Returns:
            b answers, without prompt and special tokens.
        """
        assert self.model is not None
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        sampling = Sampling(max_new_tokens or self.max_new_tokens, self.temperature)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        # Ranks that gather weights from each other have to take equally many steps.
        together = is_sharding(self.trainer.strategy)
        with self.method.compute():
            return answer(self.model, tokenizer, ids, mask, sampling, together=together)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Answers beside the rows' numbers, prompts and references, where the batch has these."""
        columns = {"row": "row", "prompt": "prompt_text", "reference": "reference"}
        given = {name: batch[key] for name, key in columns.items() if key in batch}
        return [
            {name: values[i] for name, values in given.items()} | {"answer": answer}
            for i, answer in enumerate(self.generate(batch))
        ]

    # -- checkpoints --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where the model came from, how it is prompted, and the untuned loss.

        What is as it was at the start is left out.

        Raises:
            InputError: if the training has diverged: the checkpoint would be of no use.
        """
        self._guard.check()
        plugin = self.trainer.precision_plugin
        whole = self.saves_all_weights or is_sharding(self.trainer.strategy)
        if isinstance(plugin, FalqonPrecision) and not whole:
            plugin.pack_checkpoint(checkpoint)
        data = getattr(self.trainer, "datamodule", None)
        checkpoint["LitCausalLM"] = {
            "prompt": getattr(data, "prompt", None),
            "model_name": self.model_name,
            "revision": self.revision,
            "base_loss": self.base_loss,
        }
        if not isinstance(self.method, Falqon):
            assert self.model is not None
            method_state.shrink(self.method, self.model, checkpoint, self._frozen_hash())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or recipe before anything is loaded from it.

        Raises:
            InputError: naming what differs.
        """
        where = f"checkpoint {self.trainer.ckpt_path}"
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, FalqonPrecision):
            plugin.check_settings(checkpoint.get("FalqonPrecision"), where)
        elif "FalqonPrecision" in checkpoint:
            raise InputError(
                f"{where} was trained with FalqonPrecision: add falqon.FalqonPrecision to "
                "trainer.plugins, with the settings of that run's config.yaml."
            )
        self.base_loss = checkpoint.get("LitCausalLM", {}).get("base_loss")
        if not isinstance(self.method, Falqon):
            assert self.model is not None
            method_state.check(self.method, self.model, checkpoint, where)
            method_state.check_frozen(self._frozen_hash(), checkpoint, where)
            return
        if isinstance(plugin, FalqonPrecision):
            plugin.unpack_checkpoint(checkpoint, self, where)
        method_state.check_shapes(self, self.model_name, checkpoint, where)

    def _frozen_hash(self) -> str:
        """Hash of what training does not change, computed once."""
        assert self.model is not None
        self._frozen = self._frozen or method_state.frozen_hash(self.method, self.model)
        return self._frozen
