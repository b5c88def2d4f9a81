"""Weights, gradients, averages and optimizer states that the processes hold a part of each: FSDP, by accelerate's file.

One group of all weights that train: they are joined for a training step, a preview and a checkpoint. A saved state and
a checkpoint have complete tensors, so that a run goes on with or without, on any number of processes.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ldm.training.muon import Muon


def use_fsdp(accelerator: Any) -> None:
    """Shard as accelerate's configuration says, on CPUs too, where accelerate ignores it; ValueError if it cannot."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if accelerator.num_processes == 1:
        raise ValueError("FSDP shards between processes, and this is one: start several, or leave FSDP out")
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(nn.Module())
    if plugin.fsdp_version != 2 or plugin.auto_wrap_policy is not None or plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "FSDP works here with fsdp_version: 2, fsdp_auto_wrap_policy: NO_WRAP and "
            "fsdp_cpu_ram_efficient_loading: false, as in docs/how-to/fsdp.yaml"
        )
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin


def check_fsdp(stage: Any, optimizers: Sequence[Any], **settings: Any) -> None:
    """Raise ValueError for stages, optimizers and settings of the loop that are not for FSDP.

    What a stage changes of its weights at the end would be lost, and what one process alone writes would wait for all.
    """
    if len(optimizers) > 1 or "finish" in vars(type(stage)) or not stage.rehearses:
        raise ValueError(
            "FSDP is for DiffusionStage and PixelDiffusionStage, whose weights are only trained: "
            f"start {type(stage).__name__} without it"
        )
    if hasattr(optimizers[0], "eval"):
        raise ValueError(f"FSDP is not for {type(optimizers[0]).__name__}, which averages the weights itself")
    if isinstance(optimizers[0], Muon):
        raise ValueError("FSDP is not for Muon, which needs whole matrices")
    for name, value in settings.items():
        if value:
            raise ValueError(f"loop.{name} is not possible with FSDP")
