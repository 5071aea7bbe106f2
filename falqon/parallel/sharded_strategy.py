"""ShardedStrategy: Lightning's ModelParallelStrategy with FALQON's checkpoints."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from falqon.checkpoint import TEMPORARY_SUFFIX, AtomicCheckpointIO, CheckpointError, changes
from falqon.checkpoint import sharded as files
from falqon.checkpoint.io import read_checkpoint, remove_leftovers
from falqon.errors import InputError
from falqon.manifest import describe
from falqon.parallel.wholes import part_of, whole_tensor

_T = TypeVar("_T")


class ShardedStrategy(ModelParallelStrategy):
    """Cuts a model up over devices: FSDP2, tensor parallelism, or both.

    The number of devices is `data_parallel_size` times `tensor_parallel_size`. Ranks of different
    data-parallel index have different rows, and share the weights out among them (FSDP2); ranks of
    one tensor-parallel group work on the same rows. The LightningModule's `configure_model` does
    the cutting, as `lit_modules.LitCausalLM` does it.

    Checkpoints can be resumed on any number of devices, with this strategy, with ddp, and on one
    device; and so can theirs with this strategy. Optimizer states go by the names of parameters.

    Args:
        data_parallel_size: Devices with different rows; `auto`: all that tensor parallelism leaves.
        tensor_parallel_size: Devices that share every layer's work.
        save_distributed_checkpoint: Every rank writes its part, and a checkpoint is a directory.
            Otherwise rank zero gathers all and writes one file.
        process_group_backend: As in Lightning.
        timeout_minutes: How long a rank waits for the others before it gives up.

    Raises:
        InputError: If a size is not positive, or tensor parallelism is to write checkpoints in
            parts.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        for key, size in (
            ("data_parallel_size", data_parallel_size),
            ("tensor_parallel_size", tensor_parallel_size),
        ):
            if size != "auto" and (not isinstance(size, int) or size < 1):
                raise InputError(f"trainer.strategy {key} is {size!r}; use 1 or more.")
        if tensor_parallel_size > 1 and save_distributed_checkpoint:
            raise InputError(
                "with tensor_parallel_size above 1 a checkpoint is one file: set "
                "save_distributed_checkpoint to false."
            )
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def setup_environment(self) -> None:
        count, tensor = self.num_nodes * self.num_processes, self._tensor_parallel_size
        assert isinstance(tensor, int)
        if self._data_parallel_size == "auto" and count % tensor == 0:
            self._data_parallel_size = count // tensor
        if self._data_parallel_size == "auto" or self._data_parallel_size * tensor != count:
            raise InputError(
                f"trainer.strategy: data_parallel_size {self._data_parallel_size} times "
                f"tensor_parallel_size {tensor} is not the number of devices, {count}."
            )
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        # FSDP2 gathers into memory that it keeps, and autograd refuses what inference mode made.
        loops = (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        )
        for loop in loops:
            loop.inference_mode = False

    # -- saving -------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All tensors of the model: parts of them, or whole on rank zero and empty elsewhere."""
        assert self.model is not None
        state: dict[str, Tensor] = {k: v.detach() for k, v in self.model.state_dict().items()}
        if self._save_distributed_checkpoint:
            return state
        return self._gathered(state)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `lightning_module_state_dict`, in the form that one device saves."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        state: dict[str, Any] = optimizer.state_dict()
        if self._save_distributed_checkpoint:
            return state
        names = self._names(optimizer)
        state["state"] = {index: dict(entry) for index, entry in state["state"].items()}
        for index, entry in state["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.dim():
                    whole = whole_tensor(self._module, names[index], value)
                    entry[key] = whole.cpu() if self.is_global_zero else None
        return state

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; what is there is replaced when the new one is complete.

        Raises:
            CheckpointError: if it cannot be written.
            TypeError: if `storage_options` was given.
        """
        if storage_options is not None:
            raise TypeError("ShardedStrategy.save_checkpoint takes no storage_options")
        path = Path(self.broadcast(str(filepath)))
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:
                AtomicCheckpointIO().save_checkpoint(checkpoint, path)
            return
        token: str = self.broadcast(secrets.token_hex(4))
        temporary = path.with_name(f".{path.name}.{token}{TEMPORARY_SUFFIX}")
        tensors = {f"model/{k}": v for k, v in checkpoint.pop("state_dict").items()}
        skeletons = []
        for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
            names = self._names(self.optimizers[number])
            skeleton, parts = files.split_optimizer(number, state, names, _has_parts)
            skeletons.append(skeleton)
            tensors |= parts
        try:
            if self.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(path.parent)
                temporary.mkdir()
                files.write_meta(temporary, checkpoint | {"optimizer_skeletons": skeletons})
            self.barrier()
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True))
            # Every rank hashes what it wrote; rank zero the rest.
            own = {p.name: describe(p) for p in temporary.glob(f"__{self.global_rank}_*")}
            hashes = self._of_all_ranks(own)
            if self.is_global_zero:
                files.write_seal(temporary, {k: v for found in hashes for k, v in found.items()})
                files.replace_directory(temporary, path)
            self.barrier()
        except (OSError, dcp.api.CheckpointException) as error:
            text = str(error).strip().split("\n", maxsplit=1)[0][:200]
            raise CheckpointError(
                f"checkpoint {path} cannot be written ({type(error).__name__}: {text}). Free "
                "space, keep fewer checkpoints (save_top_k), or set another directory, then resume "
                "from the last checkpoint."
            ) from error

    def _gathered(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        out = {}
        for name, tensor in state.items():
            whole = whole_tensor(self._module, name, tensor)
            if self.is_global_zero:
                out[name] = whole.cpu()
        return out

    # -- loading ------------------------------------------------------------------------------

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, of this strategy or another, of parts or in one file.

        Of parts only their shapes are read here, and `load_model_state_dict` reads the rest; with
        tensor parallelism all of it is read, by every rank.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if self.is_global_zero:
            files.recover(path)
        self.barrier()
        if not files.is_sharded(path):
            self._source = None
            return read_checkpoint(path, mmap=True)
        self._check(path)
        checkpoint = files.read_meta(path)
        if self._tensor_parallel_size != 1 or changes.is_small(checkpoint):
            # What is cut otherwise than it was saved is cut from the whole.
            self._source = None
            return files.read_sharded(path)
        self._source = path
        tensors = files.shapes(path)
        checkpoint["state_dict"] = {
            k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")
        }
        checkpoint["optimizer_states"] = checkpoint.pop("optimizer_skeletons")
        return checkpoint

    def _check(self, path: Path) -> None:
        """Ranks share the work, and all of them raise what one of them found."""
        wrong = None
        try:
            files.check_sharded(path, part=self.global_rank, parts=self.world_size)
        except CheckpointError as error:
            wrong = str(error)
        for found in self._of_all_ranks(wrong):
            if found is not None:
                raise CheckpointError(found)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give every parameter its part."""
        own: dict[str, Tensor] = {k: v.detach() for k, v in self._module.state_dict().items()}
        if self._source is not None:
            files.load_tensors(self._source, {f"model/{k}": v for k, v in own.items()})
            return
        saved: Mapping[str, Tensor] = checkpoint["state_dict"]
        missing = sorted(own.keys() - saved.keys())
        if missing and strict:
            raise CheckpointError(
                f"the checkpoint has no {missing[0]}. Use one of a run with this model."
            )
        for name, tensor in own.items():
            if name in saved:
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                local.copy_(part_of(self._module, name, saved[name], tensor))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every optimizer its parts, found by the names of their parameters."""
        for number, optimizer in enumerate(self.optimizers):
            saved = checkpoint["optimizer_states"][number]
            names = self._names(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if self._source is not None:
                saved = self._read_parts(number, saved, dict(zip(names, parameters, strict=True)))
            else:
                saved = {"param_groups": saved["param_groups"], "state": dict(saved["state"])}
                for index, entry in saved["state"].items():
                    saved["state"][index] = {
                        key: self._cut(names[index], value, parameters[index])
                        for key, value in entry.items()
                    }
            optimizer.load_state_dict(saved)

    def _read_parts(
        self, number: int, skeleton: Mapping[str, Any], parameters: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        assert self._source is not None
        wanted = {
            f"optimizer/{number}/{name}/{key}": torch.zeros_like(parameters[name])
            for index, name in enumerate(skeleton["names"])
            for key, value in skeleton["state"].get(index, {}).items()
            if value is None
        }
        files.load_tensors(self._source, wanted)
        return files.fill_optimizer(number, skeleton, wanted)

    def _cut(self, name: str, value: Any, parameter: Tensor) -> Any:
        """This rank's part of a whole tensor of the optimizer state."""
        if not isinstance(value, Tensor) or not value.dim():
            return value
        part = part_of(self._module, name, value, parameter)
        if not isinstance(parameter, DTensor):
            return part.clone()
        return DTensor.from_local(
            part.to(parameter.device).contiguous(),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    # -- helpers ------------------------------------------------------------------------------

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _of_all_ranks(self, mine: _T) -> list[_T]:
        found: list[_T] = [mine] * self.world_size
        torch.distributed.all_gather_object(found, mine)
        return found

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of an optimizer's parameters in its order."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        by_id = {id(p): name for name, p in self._module.named_parameters()}
        return [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(
            "fsdp2", cls, description="FSDP2 with FALQON's checkpoints", override=True
        )


def _has_parts(value: Tensor) -> bool:
    return isinstance(value, DTensor)


ShardedStrategy.register_strategies(StrategyRegistry)  # for `strategy: fsdp2`
