"""Weights, gradients, averages and optimizer states that the processes hold a part of each: FSDP, by accelerate's file.

One group of all weights that train: they are joined for a training step, a preview and a checkpoint. A saved state and
a checkpoint have complete tensors, so that a run goes on with or without, on any number of processes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def use_fsdp(accelerator: Any) -> None:
    """Shard as accelerate's configuration says, on CPUs too, where accelerate ignores it; ValueError if it cannot."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
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
    for name, value in settings.items():
        if value:
            raise ValueError(f"loop.{name} is not possible with FSDP")


def complete(state: Any) -> Any:
    """Return a state, or tensor, with complete tensors; all processes call this."""
    if not torch.distributed.is_initialized():
        return state
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda x: x.full_tensor(), state, test_type=lambda x: hasattr(x, "full_tensor"))


def like(value: Any, live: Tensor) -> Any:
    """Return a complete tensor sharded as a live one is; others as they are."""
    if not hasattr(live, "full_tensor") or not isinstance(value, Tensor) or value.shape != live.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(live, DTensor)
    return distribute_tensor(value.to(live.device), live.device_mesh, live.placements)


def sharded(state: dict[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state with its tensors sharded as those of the run's parts are."""
    live = {"networks": parts["networks"].state_dict(), "ema": parts["ema"].shadow}
    state |= {"networks": {k: like(v, live["networks"][k]) for k, v in state["networks"].items()}}
    state["ema"] |= {"shadow": {k: like(v, live["ema"][k]) for k, v in state["ema"]["shadow"].items()}}
    for key in (key for key in parts if key.startswith("optimizer_")):
        weights = [p for group in parts[key].param_groups for p in group["params"]]
        for number, entries in state[key]["state"].items():
            state[key]["state"][number] = {name: like(v, weights[number]) for name, v in entries.items()}
    return state


@contextmanager
def joined(module: Any) -> Iterator[None]:
    """In the block, the weights are complete: for what calls the networks outside of a training step."""
    if not hasattr(module, "unshard"):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
