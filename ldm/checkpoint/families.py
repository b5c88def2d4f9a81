"""Which model a file without configuration holds: its structure from the weights, the rest from a table of families."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.compvis import PREFIXES, has_part, tidy
from ldm.checkpoint.family_table import (
    FAMILIES,
    SCALE_FACTORS,
    SD2_BASE,
    Family,
    find_concat,
    find_family,
    given_channels,
    is_text,
    kind,
)
from ldm.checkpoint.foreign import SDXL, WANTED, refuse_foreign
from ldm.checkpoint.structure import PICTURE, UNET, WHOLE, Shapes, read_conditioner, read_first_stage, read_unet, under
from ldm.diffusion.schedule import make_schedule

PREDICTIONS = ("eps", "x0", "v")
HEADS = ("num_heads", "num_head_channels")

# Training steps that .ckpt files record -> what those models predict, where all descendants have the same shapes:
# SD 2.0 base, 2.1 base; 2.1, 2.0 at 768 pixels.
_SD2_STEPS = {875_000: "eps", 220_000: "eps", 110_000: "v", 140_000: "v"}
# modelspec.prediction_type; diffusers' words for it, too
_HEADER_PREDICTIONS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "sample": "x0", "x0": "x0"}
_SDXL_POOLED = (2816, 2560)  # pooled text and sizes that SDXL's UNets take: base, refiner


class Recognised(NamedTuple):
    """What a file holds.

    family: a name of the table; of a part alone, that or its kind ("kl-f8", "vq-f4", "clip", "openclip" ...).
    part: "whole", "first_stage", "unet" or "text".
    config: {"target": class, "params": ...}: of LatentDiffusion, or of the part's network.
    notes: what was recognised and what was assumed, a line each.
    """

    family: str
    part: str
    config: dict[str, Any]
    notes: list[str]


def recognise(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    prediction: str | None = None,
) -> Recognised:
    """What the tensors of a file are, from their names and shapes and what lies beside them.

    Args:
        state: as read, before `normalise`, which takes out the marks and the schedule. On the meta device only names
            and shapes count.
        metadata: a safetensors file's header.
        facts: plain values at the top of a .ckpt, such as global_step.
        prediction: what the UNet predicts ("eps", "x0", "v"), for who knows better than the file.

    Raises ValueError, in one sentence, for files of another kind, for damaged ones and for an unknown prediction.
    """
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"prediction {prediction!r} is unknown: it is one of {', '.join(PREDICTIONS)}")
    refuse_foreign(state)
    clean, _ = tidy(state)
    sizes = {name: tuple(tensor.shape) for name, tensor in clean.items()}
    shapes = {part: under(sizes, prefix) for part, prefix in PREFIXES.items() if has_part(clean, part)}
    if not shapes:
        seen = ", ".join(sorted(state)[:3])
        raise ValueError(f"the file holds no model that is known: {len(state)} tensors, such as {seen}; {WANTED}")
    if len(shapes) > 1:
        family, config, notes = _networks(shapes)
        said, prediction_note = _prediction(state, metadata or {}, facts or {}, prediction, family)
        return _whole(family, config, state, said, [*notes, prediction_note])
    ((part, sizes),) = shapes.items()
    return {"unet": _unet_alone, "first_stage": _first_stage_alone, "text": _text_alone}[part](sizes)


def _networks(shapes: Mapping[str, Shapes]) -> tuple[Family, dict[str, Any], list[str]]:
    """The family of a model of several parts, and the part of its configuration that the weights show."""
    if "unet" not in shapes:
        raise ValueError("the file has a first stage and a conditioner, but no UNet (model.diffusion_model.*)")
    if "first_stage" not in shapes:
        raise ValueError("the file has no first stage (first_stage_model.*): give one beside it (vae=FILE, --vae FILE)")
    unet = read_unet(shapes["unet"])
    first_stage = read_first_stage(shapes["first_stage"])
    conditioner = read_conditioner(shapes["text"]) if "text" in shapes else None
    conditioner = _completed(conditioner, unet, first_stage)
    z = first_stage["params"]["embed_dim"]
    concat = find_concat(unet["in_channels"] - z - given_channels(first_stage, conditioner), z, is_text(conditioner))
    family = find_family(first_stage, conditioner, concat)
    if family is None:
        raise ValueError(
            f"the file holds no model that is known: its first stage is of kind {kind(first_stage)}, its conditioner "
            f"of kind {kind(conditioner)}, and the UNet takes {unet['in_channels']} channels; {WANTED}"
        )
    config = {
        "unet_config": {"target": UNET, "params": unet | _heads(family, unet)},
        "first_stage_config": first_stage,
        "cond_stage_config": conditioner,
        "concat": concat,
    }
    return family, config, [f"recognised {family.title}: {_sizes(unet, first_stage, conditioner)}"]


def _completed(
    conditioner: dict[str, Any] | None, unet: Mapping[str, Any], first_stage: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The conditioner with what only the other two networks show, a picture to be concatenated included."""
    image_channels = first_stage["params"]["ddconfig"]["in_channels"]
    if conditioner is None and "context_dim" in unet:
        raise ValueError(
            f"the UNet attends to a context of width {unet['context_dim']}, but the file has no encoder for it "
            "(cond_stage_model.*)"
        )
    if conditioner is None and unet["in_channels"] == first_stage["params"]["embed_dim"] + image_channels:
        conditioner = {"target": PICTURE, "params": {}}  # a low resolution picture, as wide as the latents
    if kind(conditioner) == "rescaler":
        conditioner["params"]["n_stages"] = int(math.log2(_downsampling(first_stage)))  # halvings to the latents' size
    if "num_classes" in unet:
        if kind(conditioner) != "openclip" or unet.get("adm_in_channels") != conditioner["params"]["projection_dim"]:
            raise ValueError("the UNet takes classes or pooled text (label_emb), which no encoder in the file gives")
        conditioner["params"]["pooled"] = True
    return conditioner


def _whole(
    family: Family, networks: dict[str, Any], state: Mapping[str, Tensor], prediction: str, notes: list[str]
) -> Recognised:
    """The configuration of a whole model: its networks, and what lies beside the weights or is the family's."""
    if family.name == "sd-v2-v" and prediction != "v":
        family = SD2_BASE
    unet = networks["unet_config"]["params"]
    unet["image_size"] = family.latents
    first_stage = networks["first_stage_config"]
    schedule, schedule_note = _schedule(state, family)
    scale_factor, origin = stored_scale_factor(state), "read from the file"
    if scale_factor is None:
        scale_factor, origin = SCALE_FACTORS[first_stage["target"]], "assumed"
    defaults = family.defaults(_downsampling(first_stage))
    if schedule.get("zero_terminal_snr", False):
        defaults["spacing"] = "trailing"  # the others do not begin at T - 1, where alone there is no signal
    params = {
        **networks,
        "schedule": schedule,
        "prediction": prediction,
        "scale_factor": scale_factor,
        "defaults": defaults,
    }
    heads = ", ".join(f"{key} {unet[key]}" for key in HEADS if key in unet)
    notes = [*notes, f"{schedule_note}, scale factor {scale_factor:g} is {origin}, {heads} is assumed"]
    return Recognised(family.name, "whole", {"target": WHOLE, "params": params}, notes)


def stored_scale_factor(state: Mapping[str, Tensor]) -> float | None:
    """The scale factor that CompVis measured and stored (`scale_by_std`), if the tensors as read have one.

    Raises ValueError when it is no positive number.
    """
    stored = state.get("scale_factor")
    if stored is None or stored.is_meta or stored.numel() != 1:
        return None
    value = float(f"{stored.double().item():.7g}")  # float32 has no more digits
    if not 0 < value < math.inf:
        raise ValueError(f"scale_factor in the file is {value}: it must be positive")
    return value


def _prediction(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    facts: Mapping[str, Any],
    asked: str | None,
    family: Family,
) -> tuple[str, str]:
    """What the UNet predicts, by who knows best, and the note that says who that was."""
    if asked is not None:
        return asked, f"prediction {asked}, as asked for"
    mark = next((name for name in ("v_pred", "ztsnr") if name in state), None)
    if mark is not None:
        return "v", f"prediction v, by the mark {mark!r} in the file"
    header = metadata.get("modelspec.prediction_type", "").lower()
    if header in _HEADER_PREDICTIONS:
        return _HEADER_PREDICTIONS[header], f"prediction {_HEADER_PREDICTIONS[header]}, by the file's header"
    steps = facts.get("global_step")
    if family.name == "sd-v2-v" and steps in _SD2_STEPS:
        return _SD2_STEPS[steps], f"prediction {_SD2_STEPS[steps]}, by the file's {steps} training steps"
    other = "eps" if family.prediction == "v" else "v"
    return family.prediction, (
        f"prediction {family.prediction} is assumed, the file does not say: "
        f"if pictures are noise, try prediction {other} (--prediction {other})"
    )


def _schedule(state: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Any], str]:
    """`make_schedule`'s arguments, from the file's betas where it has them, and a note."""
    assumed = family.schedule | ({"zero_terminal_snr": True} if "ztsnr" in state else {})
    betas = state.get("betas")
    if betas is None or betas.is_meta or betas.ndim != 1 or len(betas) < 2:
        return assumed, f"noise schedule {_words(assumed)} is assumed"
    half = betas.dtype not in (torch.float32, torch.float64)
    tolerance = 1e-2 if half else 1e-3  # bfloat16 has 8 bits; two schedules of published models differ by 20 %
    betas = betas.double().cpu()
    # what a yaml would say of these betas: its numbers are round
    start, end = (float(f"{value:.{3 if half else 4}g}") for value in (betas[0], betas[-1]))
    sizes = {"start": start, "end": end, "T": len(betas)}
    candidates = [assumed, assumed | {"zero_terminal_snr": True}, {"name": "cosine", "T": len(betas)}]
    if 0 < start < 1 and 0 < end < 1:
        candidates += [{"name": name} | sizes for name in ("scaled_linear", "linear")]
    for candidate in candidates:
        ab = make_schedule(**candidate).alphas_cumprod
        expected = 1 - ab / torch.cat([ab.new_ones(1), ab[:-1]])
        if len(ab) == len(betas) and torch.allclose(betas, expected, rtol=tolerance, atol=0):
            return candidate, f"noise schedule {_words(candidate)} is read from the file"
    return assumed, (
        f"the file's noise schedule (betas {start:g} to {end:g}, {len(betas)} levels) is of no known kind, so that "
        f"{_words(assumed)} is assumed"
    )


def _words(schedule: Mapping[str, Any]) -> str:
    span = f" {schedule['start']:g} to {schedule['end']:g}" if "start" in schedule else ""
    zero = ", zero terminal SNR" if schedule.get("zero_terminal_snr", False) else ""
    return f"{schedule['name']}{span}{zero}"


def _heads(family: Family, unet: Mapping[str, Any]) -> dict[str, Any]:
    """The family's attention heads; in smaller models, the most or widest that divide every layer with attention."""
    mult = unet["channel_mult"]
    attended = [mult[int(math.log2(factor))] for factor in unet["attention_resolutions"]]
    widths = [unet["model_channels"] * times for times in (*attended, mult[-1])]  # the middle attends too
    counts = {key: math.gcd(family.heads[key], *widths) for key in HEADS if key in family.heads}
    return {**family.heads, **counts}


def _downsampling(first_stage: Mapping[str, Any]) -> int:
    """Pixels per latent."""
    return 2 ** (len(first_stage["params"]["ddconfig"]["ch_mult"]) - 1)


def _sizes(unet: Mapping[str, Any], first_stage: Mapping[str, Any], conditioner: Mapping[str, Any] | None) -> str:
    params = {} if conditioner is None else conditioner["params"]
    width = next((f" {params[key]} wide" for key in ("width", "n_embed", "embed_dim") if key in params), "")
    return f"UNet {unet['model_channels']} x {unet['channel_mult']}, first stage {_first_stage_name(first_stage)}, " + (
        "unconditional" if conditioner is None else f"conditioner {kind(conditioner)}{width}"
    )


def _first_stage_name(first_stage: Mapping[str, Any]) -> str:
    return f"{kind(first_stage)}-f{_downsampling(first_stage)}"


def _first_stage_alone(shapes: Shapes) -> Recognised:
    config = read_first_stage(shapes)
    name = _first_stage_name(config)
    return Recognised(name, "first_stage", config, [f"recognised a first stage alone: {name}"])


def _text_alone(shapes: Shapes) -> Recognised:
    config = read_conditioner(shapes)
    return Recognised(kind(config), "text", config, [f"recognised a conditioner alone: {kind(config)}"])


def _unet_alone(shapes: Shapes) -> Recognised:
    """A UNet without the networks around it, whose family shows in its context and channels alone."""
    unet = read_unet(shapes)
    if unet.get("adm_in_channels") in _SDXL_POOLED:
        raise ValueError(f"the file {SDXL}")
    if "context_dim" not in unet:
        conditioner = None
    elif unet.get("use_linear_in_transformer", False):
        conditioner = "openclip"
    else:
        conditioner = "bert" if unet["context_dim"] == 1280 else "clip"
    z = unet["out_channels"]
    concat = find_concat(unet["in_channels"] - z, z, conditioner is not None)
    key = (conditioner, "kl" if z == 4 else "vq", concat)
    if key not in FAMILIES:
        raise ValueError(
            f"the file holds a UNet alone, of no family that is known: {unet['in_channels']} channels in, {z} out, "
            f"context {unet.get('context_dim', 'none')}; {WANTED}"
        )
    family = FAMILIES[key]
    params = {"image_size": family.latents} | unet | _heads(family, unet)
    notes = [f"recognised a UNet alone, of {family.title}: {unet['model_channels']} x {unet['channel_mult']}"]
    return Recognised(family.name, "unet", {"target": UNET, "params": params}, notes)
