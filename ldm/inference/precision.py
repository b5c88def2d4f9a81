"""The number formats that a model computes in.

            UNet, text encoder                       first stage
full        float32                                  float32
bf16        bfloat16                                 float32
fp16        float16                                  float32
autocast    float32 weights, products in bfloat16    float32
            on a CPU, in float16 on a GPU

The first stage stays in float32: it runs once, not at every step, and it makes the pixels. With the digits model,
bfloat16 there changes pixels by up to 3 of 255, on average four times as much as bfloat16 in the UNet does over 20
steps, and in float16 some published first stages overflow. Samplers and guidance always compute in float32.

On a CPU, the half-precision weights of a large file stay as they are: see `ldm.inference.widened`.

float16 is refused on a CPU, whose libraries lack kernels for it: a convolution of Stable Diffusion's UNet takes 140
times as long as in float32 (AMD Zen 5, torch 2.15); bfloat16 takes half as long.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ldm.latent_diffusion import LatentDiffusion

DTYPES = {"full": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}
MANY = 2**28  # bytes of weights in a model, from which on they wait; copying costs small models more time than it saves
Kept = tuple[dict[str, Tensor | None], str, Tensor, Tensor]  # parameters or buffers, a key, its tensor, its data


def precision_of(model: LatentDiffusion) -> str:
    """Return the name of the precision that the model computes in."""
    if model.model.autocast:
        return "autocast"
    dtype = next(model.model.parameters()).dtype
    return next((name for name, own in DTYPES.items() if own == dtype), "full")


def weights_wait(model: LatentDiffusion, device: torch.device) -> bool:
    """Return whether half-precision weights stay as they are on that device, where each layer converts its own."""
    half = sum(p.nbytes for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16) and p.is_cpu)
    return device.type == "cpu" and half >= MANY


def set_precision(
    model: LatentDiffusion,
    name: str,
    device: str | torch.device | None = None,
    as_stored: bool = False,
    traced: bool = False,
) -> ExitStack:
    """Convert the UNet and the text encoder to a precision, until the result is closed.

    Args:
        name: full, bf16, fp16 or autocast, as in the table above.
        device: where to move the UNet at the same time, so that there it only ever exists in its precision. None: leave
            it where it is.
        as_stored: the weights are as their file has them (`ldm.load(dtype=None)`), so that all precisions are open.
        traced: the UNet will be compiled: where its weights stay as they are, each layer converts its own there, too.

    Returns:
        What restores the weights. It holds them as they were, on their device: drop it to free them.
    """
    if name not in DTYPES:
        raise ValueError(f"precision {name!r} is unknown: it is one of {', '.join(DTYPES)}")
    device = model.device if device is None else torch.device(device)
    if name == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 on a CPU takes a hundred times as long as full: use bf16, or full")
    own = precision_of(model)
    if own != name and own in ("bf16", "fp16") and not as_stored:
        raise ValueError(f"the model's weights are rounded to {own} already: load it again for precision {name}")
    undo = ExitStack()
    undo.callback(setattr, model.model, "autocast", own == "autocast")
    wait = weights_wait(model, device)
    parts = ((model.model, device), (model.cond_stage_model, None), (model.first_stage_model, None))
    for network, place in ((network, place) for network, place in parts if network is not None):
        dtype = torch.float32 if network is model.first_stage_model else DTYPES[name]
        undo.callback(_restore, _tensors(network))
        if wait:
            from ldm.inference.widened import widen

            widen(model, network, dtype, undo, traced)
        else:
            network.to(place, dtype)
    model.model.autocast = name == "autocast"
    return undo


def _tensors(network: nn.Module) -> list[Kept]:
    """Return all parameters and buffers, with what `_restore` needs."""
    dicts = [tensors for module in network.modules() for tensors in (module._parameters, module._buffers)]
    return [(d, name, tensor, tensor.data) for d in dicts for name, tensor in d.items() if tensor is not None]


def _restore(tensors: list[Kept]) -> None:
    for own, name, tensor, data in tensors:
        tensor.data = data
        own[name] = tensor
