"""DeepSpeed's ZeRO (Rajbhandari et al., 2019) as a `Strategy`; the only file that knows DeepSpeed.

Mixed precision is torch autocast over fp32 parameters at every stage, not DeepSpeed's bf16 mode: the
master, the averages and the export are then the same numbers, and stage 0 is not a special case.
Buffers are sized from the model: DeepSpeed's defaults take hundreds of megabytes for any model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitlab.batch import Batch
from vitlab.config import UserError
from vitlab.dist import World
from vitlab.engine.compiling import leave_hooks
from vitlab.engine.optim import OptimConfig, adamw
from vitlab.engine.strategy import (
    MOMENTS,
    Kind,
    Piece,
    average_buffers,
    buffers,
    fill_states,
    kept,
    moments,
    move,
)
from vitlab.methods.base import TINY, Average, Losses, Method

STAYS = 10_000  # a parameter up to this size is never given away at stage 3
# What is read of DeepSpeed's optimizers beyond its documents, by stage: a later version may rename it.
_FLAT = ("single_partition_of_fp32_groups",)
_SHARDS = ("fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat", "sub_group_to_group_id")
_GRADIENTS = ("grad_position", "grad_partitions_flat_buffer", "ipg_buckets")
PRIVATE: dict[int, tuple[str, ...]] = {0: (), 1: _FLAT, 2: _FLAT, 3: _SHARDS + _GRADIENTS}


class Zero:
    def __init__(self, method: Method, optim: OptimConfig, stage: int, world: World, **options: Any) -> None:
        """`options`: micro (samples a worker and micro-batch), accumulate, bf16, compiles, persist."""
        deepspeed = _deepspeed(world.device)
        self.deepspeed, self.method, self.stage, self.world = deepspeed, method, stage, world
        self.accumulate: int = options["accumulate"]
        settings = _settings(method, optim, stage, world, options)
        self.inner = adamw(method, optim)
        offload = deepspeed.runtime.zero.parameter_offload
        _known(deepspeed, offload, ("FWD_MODULE_STACK",))
        self.running: list[nn.Module] = offload.FWD_MODULE_STACK
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=method, optimizer=self.inner, config=settings, dist_init_required=False
        )
        _known(deepspeed, self.optimizer, PRIVATE[stage])
        self.norm: Tensor | None = None
        self.forgets = stage == 3 and world.size > 1 and not options["compiles"]
        if stage == 3:
            self._share_masters()
        if stage == 3 and options["compiles"]:
            leave_hooks(method)

    def _share_masters(self) -> None:
        """The fp32 masters are the shards themselves: both hold the same numbers, and DeepSpeed means to."""
        flat, masters = (
            self.optimizer.fp16_partitioned_groups_flat,
            self.optimizer.fp32_partitioned_groups_flat,
        )
        for shard, master in zip(flat, masters, strict=True):
            assert shard.dtype == master.dtype
            master.data = shard.data

    def forward(self, batch: Batch, ask: str = "losses") -> Any:
        if not self.forgets:
            return self.engine(batch, ask)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            return self.engine(batch, ask)

    def _pack(self, saved: Tensor) -> Any:
        """What autograd keeps of a gathered parameter is where to find it, not its numbers.

        A linear layer keeps a view of its weight, which would hold the whole weight until the gradient is
        taken; by then DeepSpeed has gathered it again.
        """
        address = saved.untyped_storage().data_ptr()
        for parameter in self.running[-1].parameters(recurse=False):
            if address and parameter.untyped_storage().data_ptr() == address:
                offset = saved.storage_offset() - parameter.storage_offset()
                return parameter, saved.shape, saved.stride(), offset
        return saved.detach()  # an output that its own graph holds would live until a gradient is taken

    def train(self, mode: bool) -> None:
        self.engine.train(mode)

    def backward(self, losses: Losses, weight: Tensor) -> None:
        # DeepSpeed averages over workers and over micro-batches; ours is a sum over both.
        open_modules = len(self.running)
        self.engine.backward(losses.loss / weight.clamp(min=TINY) * (self.world.size * self.accumulate))
        # A block that recomputes stops early, inside the module whose backward pass asked for it. So it must
        # be, because leaving would free that module's weights; but DeepSpeed still thinks that it runs.
        del self.running[open_modules:]
        if self.stage == 0 and self.engine.is_gradient_accumulation_boundary():  # DeepSpeed keeps none there
            gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
            self.norm = nn.utils.get_total_norm(gradients)
        self.engine.step()  # only the last micro-batch of a step really steps

    def step(self) -> Tensor | float | None:
        return self.norm if self.stage == 0 else self.engine.get_global_grad_norm()

    @torch.no_grad()
    def average(self, average: Average) -> None:
        if self.stage < 3:
            move(average)
            return
        momentum = average.momentum
        old: Any  # a parameter with what DeepSpeed adds to it
        new: Any
        for old, new in zip(average.target.parameters(), average.source.parameters(), strict=True):
            if _gathered(old):  # below the persistence threshold the whole stays here beside the shard
                old.lerp_(new, 1 - momentum)
            if old.ds_tensor.data_ptr() != old.data_ptr():  # on one worker both may be the same memory
                old.ds_tensor.lerp_(new.ds_tensor, 1 - momentum)
        average_buffers(average)

    # ------------------------------------------------------------ state, see vitlab.engine.checkpoint

    def own(self) -> Iterator[Piece]:
        for piece in self._shards():
            whole = (
                self.stage == 0
                or piece.kind == "buffer"
                or (self.stage < 3 and not self._trained(piece.name))
            )
            if self.world.first or not whole:
                yield piece

    def copies(self) -> Iterator[Piece]:
        yield from self._shards()
        for name, parameter in kept(self.method).items():
            if self.stage in (1, 2):
                yield Piece(name, "weight", 0, parameter.data.view(-1))
            elif self.stage == 3 and parameter.requires_grad:
                yield self._ds_shard(name, parameter)
            if self.stage == 3 and _gathered(parameter):
                yield Piece(name, "weight", 0, parameter.data.view(-1))

    def _shards(self) -> Iterator[Piece]:
        """This rank's masters and moments, and everything that all ranks hold whole."""
        for name, parameter in kept(self.method).items():
            if self.stage == 3 and parameter.requires_grad:
                yield from self._stage3(name, parameter)
            elif self.stage == 3:
                yield self._ds_shard(name, parameter)
            elif self.stage and parameter.requires_grad:
                yield from self._stage12(name, parameter)
            else:
                yield Piece(name, "weight", 0, parameter.data.view(-1))
                for kind in MOMENTS:
                    if kind in self.inner.state.get(parameter, {}):
                        yield Piece(name, kind, 0, self.inner.state[parameter][kind].view(-1))
        yield from buffers(self.method)

    def _stage12(self, name: str, parameter: Any) -> Iterator[Piece]:
        mapping = parameter._hp_mapping
        if mapping is None:  # the whole parameter lies in other ranks' partitions
            return
        flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        start, at = mapping.lp_fragment_address.start, mapping.hp_fragment_address
        yield Piece(name, "weight", start, flat.data.narrow(0, at.start, at.numel))
        for kind in MOMENTS:
            if kind in self.inner.state.get(flat, {}):
                yield Piece(name, kind, start, self.inner.state[flat][kind].narrow(0, at.start, at.numel))

    def _stage3(self, name: str, parameter: Any) -> Iterator[Piece]:
        size = parameter.ds_tensor.numel()
        start = size * self.world.rank
        count = max(0, min(size, parameter.ds_numel - start))  # the last shard is padded
        part = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)][0]
        state = self.inner.state.get(self.optimizer.fp32_partitioned_groups_flat[part], {})
        kinds = ["weight", *(kind for kind in MOMENTS if kind in state)]
        for kind in kinds if count else ():
            key = None if kind == "weight" else kind
            data = self.optimizer.get_local_fp32_param(parameter, key).view(-1)
            yield Piece(name, kind, start, data[:count])

    def _ds_shard(self, name: str, parameter: Any) -> Piece:
        shard = parameter.ds_tensor.data.view(-1)
        start = shard.numel() * self.world.rank
        return Piece(name, "weight", start, shard[: max(0, min(shard.numel(), parameter.ds_numel - start))])

    def _trained(self, name: str) -> bool:
        return self.method.get_parameter(name).requires_grad

    def set_steps(self, steps: int) -> None:
        for group, master in self._masters():
            fill_states(self.inner, [master], steps - group["first"])
        # DeepSpeed counts micro-batches to know which one closes a step.
        self.engine.global_steps = steps
        self.engine.micro_steps = steps * self.accumulate

    def _masters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """The fp32 tensors that AdamW really steps, flat ones above stage 0, with their groups."""
        for number, group in enumerate(self.inner.param_groups):
            if self.stage == 0:
                yield from ((group, parameter) for parameter in group["params"])
            elif self.stage < 3:
                yield group, self.optimizer.single_partition_of_fp32_groups[number]
        for part, master in enumerate(self.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else ()):
            yield self.inner.param_groups[self.optimizer.sub_group_to_group_id[part]], master

    @torch.no_grad()
    def state(self, module: nn.Module) -> dict[str, Tensor] | None:
        out: dict[str, Tensor] = {}
        tensors = module.state_dict(keep_vars=True)
        for name, tensor in tensors.items():  # one at a time: the whole model is never gathered at once
            with self.deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if self.world.first:
                    out[name] = tensor.detach().cpu().clone()
        return out if self.world.first else None

    def tensors(self) -> Iterator[tuple[Kind, Tensor]]:
        for parameter in self.method.parameters():
            kind: Kind = "weights" if parameter.requires_grad else "frozen"
            if self.stage == 3:
                shard: Any = parameter
                yield kind, shard.ds_tensor
                kind = "copies" if shard.ds_persist else "passing"
            yield kind, parameter.data
            if parameter.grad is not None:
                yield "passing" if self.stage > 1 else "gradients", parameter.grad
        for _, master in self._masters():
            yield "weights", master
            if master.grad is not None:
                yield "gradients", master.grad
        yield from moments(self.inner)
        if self.stage == 3:
            yield "gradients", self.optimizer.grad_partitions_flat_buffer
            buckets = (bucket.buffer for bucket in self.optimizer.ipg_buckets.values())
            yield from (("passing", buffer) for buffer in buckets if buffer is not None)

    def close(self) -> None:
        self.engine.destroy()
        if self.method in self.running:  # DeepSpeed would keep it, and its weights, to the process's end
            self.running.remove(self.method)


def _settings(
    method: Method, optim: OptimConfig, stage: int, world: World, options: dict[str, Any]
) -> dict[str, Any]:
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    bucket = max(1_000_000, min(trained // 8, 50_000_000)) // 1024 * 1024 + 1024  # DeepSpeed wants it aligned
    return {
        "train_micro_batch_size_per_gpu": options["micro"],
        "gradient_accumulation_steps": options["accumulate"],
        "gradient_clipping": optim.clip or 1e30,  # never 0: the norm is logged in any case
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        # No "safe" modules: DeepSpeed would reduce their gradients, and gather their weights, in bfloat16.
        "torch_autocast": {
            "enabled": options["bf16"],
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": False,
            "sub_group_size": max(65_536, trained // world.size // 16),
            "stage3_prefetch_bucket_size": bucket // 2,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": bucket,
            "stage3_param_persistence_threshold": STAYS if options["persist"] is None else options["persist"],
            "memory_efficient_linear": False,  # its own linear layer has its own idea of autocast
        },
    }


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, for this device, without compiling its shared-memory collective on a CPU."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        ops["deepspeed_shm_comm"] = False  # a private name; gloo serves instead, the build takes a minute
    return deepspeed


def _known(deepspeed: Any, owner: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise UserError(
            f"deepspeed: version {deepspeed.__version__} has no {', '.join(missing)}, which sharded training "
            "and its checkpoints need; install deepspeed 0.18 or 0.19"
        )


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    parameter, shape, strides, offset = saved
    assert _gathered(parameter)
    view: Tensor = parameter.data.as_strided(shape, strides, parameter.storage_offset() + offset)
    return view


def _gathered(parameter: Any) -> bool:
    return bool(parameter.numel() == parameter.ds_numel)
