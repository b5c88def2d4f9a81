"""Guides for `generate`: perturbed attention, autoguidance by a weaker model, guidance by a classifier, thresholding.

Each function returns a `Guide`, the `guide` argument of `LatentDiffusion.generate`; the formulas are in
`diffusion/further_guidance.py`.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.checkpoint.file import checkpoint_at, file_hash
from ldm.conditioning.classes import class_numbers
from ldm.diffusion import further_guidance
from ldm.diffusion.denoiser import BoundDenoise, Cond, Prediction
from ldm.diffusion.guidance import Guide
from ldm.diffusion.schedule import Schedule, make_schedule
from ldm.inference.precision import precision_of, set_precision
from ldm.inference.recipe import Recipe
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.attention import BasicTransformerBlock
from ldm.models.blocks import AttentionBlock
from ldm.models.compiler import uncompiled
from ldm.settings import Guidance, checked
from ldm.util import call_with

PAG_LAYERS = ("middle_block",)


def make_guide(
    model: LatentDiffusion,
    threshold: float | None = None,
    pag: float = 0.0,
    pag_layers: Sequence[str] | None = None,
    weak: LatentDiffusion | str | Path | None = None,
    autoguide_scale: float | None = None,
    classifier: "NoisyClassifier | str | Path | None" = None,
    classifier_scale: float | None = None,
) -> Guide | None:
    """Return one guide for all kinds of guidance that are asked for, or None without any.

    What is not given is as in `ldm.settings.Guidance`.

    Args:
        threshold: percentile, a fraction, of `further_guidance.dynamic_threshold`, which comes last.
        pag, pag_layers: scale and layers of `pag_guide`; scale 0 is off.
        weak, autoguide_scale: the weaker model, or its checkpoint, and the scale of `autoguide`; scale 1 is off.
        classifier, classifier_scale: of `classifier_guide`, the classifier or its checkpoint; scale 0 is off.
    """
    scales = {"autoguide_scale": autoguide_scale, "classifier_scale": classifier_scale}
    if weak is None and autoguide_scale is not None:
        raise ValueError("autoguide_scale has no effect without weak")
    if classifier is None and classifier_scale is not None:
        raise ValueError("classifier_scale has no effect without classifier")
    own = Guidance(**checked(Guidance, {"threshold": threshold, "pag": pag, "pag_layers": pag_layers, **scales}))
    guides: list[Guide] = []
    if weak is not None:
        weak = load_weak(weak, model) if isinstance(weak, str | Path) else weak
        guides.append(autoguide(model, weak, own.autoguide_scale))
    if own.pag != 0:
        guides.append(pag_guide(model, own.pag, own.pag_layers))
    if classifier is not None:
        classifier = load_classifier(classifier, model) if isinstance(classifier, str | Path) else classifier
        guides.append(classifier_guide(classifier, own.classifier_scale))
    if (percentile := own.threshold) is not None:
        guides.append(lambda denoise, *_: further_guidance.dynamic_threshold(denoise, percentile, limit=model.clip))

    def guide(denoise: BoundDenoise, cond: Cond, prompts: Sequence[Any]) -> BoundDenoise:
        for add in guides:
            denoise = add(denoise, cond, prompts)
        return denoise

    return guide if guides else None


def pag_guide(model: LatentDiffusion, scale: float, layers: Sequence[str] = PAG_LAYERS) -> Guide:
    """Guide away from the model with the identity as attention map in these layers (Ahn et al. 2024).

    It costs one more evaluation of the model in each step. Scale 0 is off; the layers are names as in `self_attention`.
    """
    _check_deterministic(model)
    modules = self_attention(model.model.diffusion_model, layers)

    def guide(denoise: BoundDenoise, cond: Cond, prompts: Sequence[Any]) -> BoundDenoise:
        network = model.denoiser()

        def perturbed(x: Tensor, sigma: float) -> Prediction:
            with identity_attention(modules):
                return network(x, sigma, cond)

        return further_guidance.perturbed_attention(denoise, perturbed, scale)

    return guide


def self_attention(unet: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """Return the self-attention modules of these layers: "middle_block", "input_blocks.4", or a module's full name."""
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
    """Let every token attend only to itself in these modules, in this thread, inside the `with` block.

    A forward hook replaces the output of these `CrossAttention` or `AttentionBlock`: nothing in them changes, and other
    threads are not affected.
    """
    thread = get_ident()

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if get_ident() != thread:
            return output
        return _identity_block(module, *args) if isinstance(module, AttentionBlock) else _identity(module, *args)

    with ExitStack() as hooks, uncompiled():
        for module in modules:
            hooks.enter_context(module.register_forward_hook(replace, prepend=True))
        yield


def _identity(attention: Any, x: Tensor) -> Tensor:
    """Compute a CrossAttention with the identity as its map: x (b, n, d) -> (b, n, d)."""
    return attention.to_out(attention.to_v(x))


def _identity_block(block: AttentionBlock, x: Tensor) -> Tensor:
    """Compute an AttentionBlock with the identity as its map: x (b, c, h, w) -> (b, c, h, w)."""
    order = "three h d" if block.use_new_attention_order else "h three d"
    qkv = block.qkv(block.norm(x).flatten(2))  # (b, 3c, n)
    values = rearrange(qkv, f"b ({order}) n -> three b (h d) n", three=3, h=block.num_heads)[2]  # (b, c, n)
    return x + block.proj_out(values).view(x.shape)


def autoguide(model: LatentDiffusion, weak: LatentDiffusion, scale: float) -> Guide:
    """Guide away from a weaker model (Karras et al. 2024), under the same conditioning.

    It costs one evaluation of the weaker model in each step. Scale 1 is off.

    Args:
        model: its text encoder serves both.
        weak: a model of the same latents and texts, as `load_weak` returns it, with its own schedule, prediction and
            scale factor.
    """
    _check_deterministic(model, weak)
    ratio = weak.scale_factor / model.scale_factor

    def guide(denoise: BoundDenoise, cond: Cond, prompts: Sequence[Any]) -> BoundDenoise:
        network = weak.denoiser()

        def weaker(x: Tensor, sigma: float) -> Prediction:  # the same latents in the weak model's units
            return Prediction(network(x * ratio, sigma * ratio, cond).x0 / ratio)

        return further_guidance.autoguidance(denoise, weaker, scale)

    return guide


def _check_deterministic(*models: LatentDiffusion) -> None:
    """Raise ValueError for a denoising GAN, two predictions of which differ by their random latents alone."""
    if any(model.random_x0 for model in models):
        raise ValueError("a denoising GAN samples its x0 at random, so it cannot be guided by a second prediction")


def load_weak(path: str | Path, model: LatentDiffusion) -> LatentDiffusion:
    """Load the weaker model for `autoguide`, such as an earlier checkpoint, on the model's device in its precision."""
    from ldm.loading import load

    weak = load(path, device="cpu")
    check_weak(weak, model)
    weak.first_stage_model = weak.cond_stage_model = None  # the model's own are used
    set_precision(weak, precision_of(model), model.device)
    return weak


def check_weak(weak: LatentDiffusion, model: LatentDiffusion) -> None:
    """Raise ValueError unless both have the same latents, conditioning and concatenated input.

    Latents are the encoder's: the decoders may differ. Rounding to half precision is not a difference.
    """
    latents = [_part(m.first_stage_model, "encoder.", "quant_conv.") for m in (weak, model)]
    texts = [_part(m.cond_stage_model) for m in (weak, model)]
    classes = [getattr(m.cond_stage_model, "n_classes", 0) for m in (weak, model)]
    problem = None
    if weak.channels != model.channels or not _similar(*latents):
        problem = "its first stage has other latents"
    elif not _similar(*texts):
        problem = "its text encoder has other weights"
    elif classes[0] != classes[1]:
        problem = f"it has {classes[0]} classes, this model {classes[1]}"
    elif weak.concat != model.concat:
        inputs = [m.concat or "no image" for m in (weak, model)]
        problem = f"its UNet takes {inputs[0]} beside the latents, this model's {inputs[1]}"
    if problem is not None:
        raise ValueError(f"{weak.path} cannot guide this model: {problem}")


class NoisyClassifier(NamedTuple):
    """network(x_t, t) -> logits (b, classes) of noised images or latents, at timestep t of this schedule."""

    network: nn.Module
    schedule: Schedule
    classes: int


def classifier_guide(classifier: NoisyClassifier, scale: float) -> Guide:
    """Guide towards the classes that the prompts name (Dhariwal & Nichol 2021), for any model.

    It costs a forward and a backward pass of the classifier in each step. Prompts are class numbers from 0, as int or
    text; an image with the empty prompt is not guided; the guide raises ValueError for others.
    """

    def guide(denoise: BoundDenoise, cond: Cond, prompts: Sequence[Any]) -> BoundDenoise:
        network, schedule, classes = classifier
        numbers = class_numbers(prompts, classes, null=-1) % (classes + 1)  # of no class: `classes`
        return further_guidance.classifier(denoise, further_guidance.noisy_log_prob(network, schedule, numbers), scale)

    return guide


def load_classifier(path: str | Path, model: LatentDiffusion) -> NoisyClassifier:
    """Load the classifier of `classifier_guide` from a `NoisyClassifierStage`'s checkpoint, on the model's device."""
    from ldm.checkpoint.file import load_file
    from ldm.loading import load_network

    schedule = load_file(path)[0].get("schedule")
    if not isinstance(schedule, dict):
        raise ValueError(f"{path} is not a classifier of noised images: its configuration has no schedule")
    network, own = load_network(path, str(model.device)), model.defaults
    size = model.latent_size(own["height"], own["width"])
    try:
        logits = network(torch.zeros(1, *size, device=model.device), torch.zeros(1, device=model.device))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this model, whose latents are {tuple(size)}: {error}") from None
    return NoisyClassifier(network, call_with(f"schedule of {path}", make_schedule, schedule), logits.shape[1])


def _part(network: nn.Module | None, *prefixes: str) -> dict[str, Tensor]:
    """Return the tensors of a network, or those with these prefixes; {} without a network."""
    state = {} if network is None else network.state_dict()
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes or "")}


def _similar(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return whether both have the same tensors, each within 1 % of its norm (bfloat16 rounds by 0.2 %)."""
    if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in second.items()}:
        return False
    pairs = ((tensor.float().cpu(), second[name].float().cpu()) for name, tensor in first.items())
    return not any((a - b).norm() > 0.01 * b.norm() for a, b in pairs)


def guide_hashes(args: argparse.Namespace, made: Recipe | None) -> dict[str, str]:
    """Return the hashes of the files that guide. ValueError where the image was made with another file."""
    found = {}
    for name, off in (("autoguide", 1), ("classifier", 0)):
        path, scale = getattr(args, name), getattr(args, f"{name}_scale", None)
        before = "" if made is None else getattr(made, f"{name}_hash")
        scale = getattr(made, f"{name}_scale", None) if scale is None else scale
        if path is not None:
            found[f"{name}_hash"] = file_hash(checkpoint_at(path))
        elif before == "" or scale == off:
            continue
        if before not in ("", found.get(f"{name}_hash")):
            raise ValueError(
                f"{args.from_png} was made with a file of hash {before} for --{name}: give that file again, "
                f"or turn it off by --{name}-scale {off}"
            )
    return found
