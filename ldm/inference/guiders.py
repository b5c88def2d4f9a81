"""Guidance that needs more than the network's own predictions: perturbed attention, a weaker model, a classifier.

Each function gives what `LatentDiffusion.generate` takes as `guide`; `diffusion.guidance` has the formulas.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioning.classes import class_numbers
from ldm.diffusion import guidance
from ldm.diffusion.denoiser import BoundDenoise, Cond, Prediction
from ldm.diffusion.guidance import Guide
from ldm.diffusion.schedule import Schedule, make_schedule
from ldm.inference.precision import precision_of, set_precision
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.attention import BasicTransformerBlock
from ldm.models.blocks import AttentionBlock
from ldm.optional.denoising_gan import DenoisingGAN
from ldm.util import call_with

PAG_LAYERS = ("middle_block",)


def make_guide(
    model: LatentDiffusion,
    threshold: float | None = None,
    pag: float = 0.0,
    pag_layers: Sequence[str] = PAG_LAYERS,
    weak: LatentDiffusion | None = None,
    autoguide_scale: float = 2.0,
    teller: "NoisyClassifier | None" = None,
    classifier_scale: float = 1.0,
) -> Guide | None:
    """All that the options ask for as one guide, or None where they ask for nothing.

    threshold: the percentile, a fraction, of `dynamic_threshold`, which comes last. pag, pag_layers: of
    `perturbed_attention`. weak, autoguide_scale: of `autoguidance`. teller, classifier_scale: of `classifier`.
    Raises ValueError for layers without self-attention.
    """
    guides: list[Guide] = []
    if weak is not None:
        guides.append(autoguidance(model, weak, autoguide_scale))
    if pag != 0:
        guides.append(perturbed_attention(model, pag, pag_layers))
    if teller is not None:
        guides.append(classifier(teller, classifier_scale))
    if threshold is not None:
        guides.append(lambda denoise, *_: guidance.dynamic_threshold(denoise, threshold, limit=model.clip))

    def guide(denoise: BoundDenoise, cond: Cond, prompts: Sequence[Any]) -> BoundDenoise:
        for more in guides:
            denoise = more(denoise, cond, prompts)
        return denoise

    return guide if guides else None


def perturbed_attention(model: LatentDiffusion, scale: float, layers: Sequence[str] = PAG_LAYERS) -> Guide:
    """Away from the model with the identity for the self-attention of these layers (Ahn et al. 2024).

    layers: names in the UNet, as for `self_attention`. Costs one evaluation more for each step. Raises ValueError as
    that, and for a model that draws latents of its own.
    """
    _check_no_latent(model)
    modules = self_attention(model.model.diffusion_model, layers)

    def guide(denoise: BoundDenoise, cond: Cond, prompts: Sequence[Any]) -> BoundDenoise:
        network = model.denoiser()

        def perturbed(x: Tensor, sigma: float) -> Prediction:
            with identity_attention(modules):
                return network(x, sigma, cond)

        return guidance.perturbed_attention(denoise, perturbed, scale)

    return guide


def self_attention(unet: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """The self-attention modules in these layers: "middle_block", "input_blocks.4", or a module's whole name.

    Raises ValueError for a layer without any.
    """
    found: dict[str, nn.Module] = {}
    for name, module in unet.named_modules():
        if isinstance(module, AttentionBlock):
            found[name] = module
        elif isinstance(module, BasicTransformerBlock) and not module.disable_self_attn:
            found[f"{name}.attn1"] = module.attn1
    chosen: dict[str, nn.Module] = {}
    for layer in layers:
        inside = {name: module for name, module in found.items() if f"{name}.".startswith(f"{layer}.")}
        if not inside:
            able = dict.fromkeys(re.match(r"middle_block|\w+\.\d+", name)[0] for name in found)
            raise ValueError(f"layer {layer!r} has no self-attention; this UNet has it in {', '.join(able) or 'none'}")
        chosen |= inside
    return list(chosen.values())


@contextmanager
def identity_attention(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, every token attends to itself alone in these modules, when this thread computes them.

    They are `CrossAttention` used as self-attention, or `AttentionBlock`. A forward hook replaces their output, so that
    nothing in them changes, other threads see nothing of it, and it ends with the block, whatever is raised in it.
    """
    thread = get_ident()

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if get_ident() != thread:
            return output
        return _identity_block(module, *args) if isinstance(module, AttentionBlock) else _identity(module, *args)

    hooks = [module.register_forward_hook(replace, prepend=True) for module in modules]
    compiled = "torch._dynamo" in sys.modules  # compiled code runs no hooks
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _identity(attention: nn.Module, x: Tensor) -> Tensor:
    """CrossAttention whose map is the identity: x (b, n, d) -> (b, n, d)."""
    return attention.to_out(attention.to_v(x))


def _identity_block(block: AttentionBlock, x: Tensor) -> Tensor:
    """AttentionBlock whose map is the identity: x (b, c, h, w) -> (b, c, h, w)."""
    order = "three h d" if block.use_new_attention_order else "h three d"
    qkv = block.qkv(block.norm(x).flatten(2))  # (b, 3c, n)
    values = rearrange(qkv, f"b ({order}) n -> three b (h d) n", three=3, h=block.num_heads)[2]  # (b, c, n)
    return x + block.proj_out(values).view(x.shape)


def autoguidance(model: LatentDiffusion, weak: LatentDiffusion, scale: float) -> Guide:
    """Away from a weaker model (Karras et al. 2024): its UNet, told the same by the model's own text encoder.

    weak: of the same latents and texts, as `load_weak` gives it; its schedule, prediction and scale factor are its own.
    Costs one evaluation of it more for each step. Raises ValueError for a model that draws latents of its own.
    """
    _check_no_latent(model, weak)
    ratio = weak.scale_factor / model.scale_factor

    def guide(denoise: BoundDenoise, cond: Cond, prompts: Sequence[Any]) -> BoundDenoise:
        network = weak.denoiser()

        def weaker(x: Tensor, sigma: float) -> Prediction:  # the same latents, in the units that it was trained in
            return Prediction(network(x * ratio, sigma * ratio, cond).x0 / ratio)

        return guidance.autoguidance(denoise, weaker, scale)

    return guide


def _check_no_latent(*models: LatentDiffusion) -> None:
    """ValueError for a denoising GAN: two predictions for one image would differ by their latents alone."""
    for model in models:
        if isinstance(model, DenoisingGAN):
            raise ValueError("a denoising GAN, which draws its x0, has no two predictions of it to steer away from")


def load_weak(path: str | Path, model: LatentDiffusion) -> LatentDiffusion:
    """The model of another checkpoint, or an earlier state of this one, for `autoguidance`.

    It is on the model's device and in its precision. Raises ValueError where it does not fit (`check_weak`), and as
    `ldm.load` does.
    """
    from ldm.loading import load

    weak = load(path, device="cpu")
    check_weak(weak, model)
    weak.first_stage_model = weak.cond_stage_model = None  # the model's own are used
    set_precision(weak, precision_of(model), model.device)
    return weak


def check_weak(weak: LatentDiffusion, model: LatentDiffusion) -> None:
    """ValueError unless both have the same latents, conditioning and concatenated input.

    The latents are the encoder's: first stages may differ in their decoders. Rounding to half precision is no
    difference.
    """
    latents = [_part(m.first_stage_model, "encoder.", "quant_conv.") for m in (weak, model)]
    if weak.channels != model.channels or not _alike(*latents):
        raise ValueError(f"{weak.path} cannot guide this model: its first stage makes other latents")
    texts = [_part(m.cond_stage_model) for m in (weak, model)]
    if not _alike(*texts):
        raise ValueError(f"{weak.path} cannot guide this model: its text encoder has other weights")
    classes = [getattr(m.cond_stage_model, "n_classes", 0) for m in (weak, model)]
    if classes[0] != classes[1]:
        raise ValueError(f"{weak.path} cannot guide this model: it knows {classes[0]} classes, this one {classes[1]}")
    if weak.concat != model.concat:
        raise ValueError(
            f"{weak.path} cannot guide this model: it is given {weak.concat or 'no image'} beside the latents, "
            f"this one {model.concat or 'no image'}"
        )


class NoisyClassifier(NamedTuple):
    """network(x_t, t) -> logits (b, classes) of noised images (or latents); t is a level of this schedule."""

    network: nn.Module
    schedule: Schedule
    classes: int


def classifier(teller: NoisyClassifier, scale: float) -> Guide:
    """Towards images of the classes that the prompts name (Dhariwal & Nichol 2021), told to the model or not.

    Prompts are numbers of classes from 0, or texts that say such; the empty one names none and is not guided. Costs the
    classifier forwards and backwards for each step. The guide raises ValueError for other prompts.
    """

    def guide(denoise: BoundDenoise, cond: Cond, prompts: Sequence[Any]) -> BoundDenoise:
        numbers = class_numbers(prompts, teller.classes, null=-1) % (teller.classes + 1)  # -1: the one behind all
        return guidance.classifier(denoise, guidance.noisy_log_prob(teller.network, teller.schedule, numbers), scale)

    return guide


def load_classifier(path: str | Path, model: LatentDiffusion) -> NoisyClassifier:
    """The classifier of a checkpoint (`ldm.optional.noisy_classifier_stage`) for `classifier`, on the model's device.

    Raises ValueError where it was not trained on noised images or does not fit what the model draws.
    """
    from ldm.checkpoint.file import load_file
    from ldm.loading import load_network

    schedule = load_file(path)[0].get("schedule")
    if not isinstance(schedule, dict):
        raise ValueError(f"{path} is no classifier of noisy images: its configuration has no schedule")
    network, own = load_network(path, str(model.device)), model.defaults
    size = model.latent_size(own["height"], own["width"])
    try:
        logits = network(torch.zeros(1, *size, device=model.device), torch.zeros(1, device=model.device))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this model, which draws {tuple(size)}: {error}") from None
    return NoisyClassifier(network, call_with(f"schedule of {path}", make_schedule, schedule), logits.shape[1])


def _part(network: nn.Module | None, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of a network, or those with these prefixes; none of no network."""
    state = {} if network is None else network.state_dict()
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes or "")}


def _alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether both have the same tensors, each within 1 % of its norm (bfloat16 rounds by 0.2 %)."""
    if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in second.items()}:
        return False
    for name, tensor in first.items():
        a, b = tensor.float().cpu(), second[name].float().cpu()
        if (a - b).norm() > 0.01 * b.norm():
            return False
    return True
