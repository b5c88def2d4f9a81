"""Recognise the model in a file without configuration: sizes from the weights, the rest from a table of families."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ldm.checkpoint import networks
from ldm.checkpoint.compvis import has_part, tidy
from ldm.checkpoint.family_table import FAMILIES, SCALE_FACTORS, SD2_BASE, Family, find_concat, find_family, kind
from ldm.checkpoint.foreign import WANTED, refuse_foreign
from ldm.checkpoint.networks import Config
from ldm.checkpoint.structure import Shapes, infer_conditioner, infer_first_stage, infer_unet, under
from ldm.checkpoint.tensors import State
from ldm.diffusion.denoiser import check_prediction
from ldm.diffusion.schedule import make_schedule

# Training steps that .ckpt files record -> what those models predict, where all descendants have the same shapes:
# SD 2.0 base, 2.1 base; 2.1, 2.0 at 768 pixels.
_SD2_STEPS = {875_000: "eps", 220_000: "eps", 110_000: "v", 140_000: "v"}
# modelspec.prediction_type; diffusers' words for it, too
_HEADER_PREDICTIONS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "sample": "x0", "x0": "x0"}
SD1_WIDTH = 320  # of the published UNets, whose descendants all predict eps
# features of the numbers that Stable Diffusion XL's UNets take behind 1280 of pooled text
_XL_NUMBERS = {"sdxl": 6 * 256, "sdxl-refiner": 5 * 256}


class Recognised(NamedTuple):
    """What a file holds, its configuration ({"target", "params"}), and what was recognised and assumed, a line each."""

    family: str  # a name of the table; of a part alone, that or its kind ("kl-f8", "vq-f4", "clip", "openclip" ...)
    part: str  # "model", "first_stage", "unet" or "text"
    config: Config
    notes: list[str]


def recognise(
    state: State,
    metadata: Config | None = None,
    facts: Config | None = None,
    prediction: str | None = None,
) -> Recognised:
    """Recognise the tensors of a file by their names and shapes and what lies beside them.

    Args:
        state: as read, before `normalise`, which takes out the marks and the schedule. On the meta device only names
            and shapes count.
        metadata: a safetensors file's header.
        facts: plain values at the top of a .ckpt, such as global_step.
        prediction: what the UNet predicts ("eps", "x0", "v", "flow"), if the user knows better than the file.
    """
    if prediction is not None:
        check_prediction(prediction)
    refuse_foreign(state)
    clean, _ = tidy(state)
    sizes = {name: tuple(tensor.shape) for name, tensor in clean.items()}
    shapes = {part: under(sizes, prefix) for part, prefix in networks.PREFIXES.items() if has_part(clean, part)}
    if not shapes:
        seen = ", ".join(sorted(state)[:3])
        raise ValueError(f"the file holds no known model: {len(state)} tensors, such as {seen}; {WANTED}")
    if len(shapes) > 1:
        return _model(shapes, state, metadata or {}, facts or {}, prediction)
    if "unet" in shapes:
        return _unet_alone(shapes["unet"])
    if "first_stage" in shapes:
        part, title, config = "first_stage", "first stage", infer_first_stage(shapes["first_stage"])
    else:
        part, title, config = "text", "conditioner", infer_conditioner(shapes["text"])
    return Recognised(_name(config), part, config, [f"recognised a {title} alone: {_name(config)}"])


def _model(
    shapes: Mapping[str, Shapes], state: State, metadata: Config, facts: Config, asked: str | None
) -> Recognised:
    if "unet" not in shapes:
        raise ValueError("the file has a first stage and a conditioner, but no UNet (model.diffusion_model.*)")
    if "first_stage" not in shapes:
        raise ValueError("the file has no first stage (first_stage_model.*): give one beside it (vae=FILE, --vae FILE)")
    unet, first_stage = infer_unet(shapes["unet"]), infer_first_stage(shapes["first_stage"])
    conditioner = infer_conditioner(shapes["text"]) if "text" in shapes else None
    conditioner = _completed(conditioner, unet, first_stage)
    family, concat = find_family(unet["in_channels"], first_stage, conditioner)
    if family is None:
        kinds = f"its first stage is of kind {kind(first_stage)}, its conditioner of kind {kind(conditioner)}"
        channels = f"the UNet takes {unet['in_channels']} channels"
        raise ValueError(f"the file holds no known model: {kinds}, and {channels}; {WANTED}")
    notes = [f"recognised {family.title}: {_sizes(unet, first_stage, conditioner)}"]
    prediction, note = _prediction(state, metadata, facts, asked, family)
    if family.name == "sd-v2-v" and prediction != "v":
        family = SD2_BASE
    unet |= _heads(family, unet) | {"image_size": family.latents}
    schedule, schedule_note = _schedule(state, family)
    scale_factor, origin = stored_scale_factor(state), "read from the file"
    if scale_factor is None:
        scale_factor, origin = family.scale_factor or SCALE_FACTORS[first_stage["target"]], "assumed"
    defaults = family.defaults(_downsampling(first_stage))
    if schedule.get("zero_terminal_snr", False):
        defaults["spacing"] = "trailing"  # the others do not begin at T - 1, where alone there is no signal
    heads = ", ".join(f"{key} {unet[key]}" for key in family.heads if key != "legacy")
    published = family.name.startswith("sd-v1") and unet["model_channels"] == SD1_WIDTH and asked is None
    usual = (prediction, schedule, scale_factor) == ("eps", family.schedule, SCALE_FACTORS[networks.KL_TARGET])
    if published and usual:
        notes = [f"recognised {family.title}, with its usual settings: it predicts eps"]  # nothing to worry about
    else:
        notes += [note, f"{schedule_note}, scale factor {scale_factor:g} is {origin}, {heads} is assumed"]
    params = {
        "unet_config": {"target": networks.UNET_TARGET, "params": unet},
        **{"first_stage_config": first_stage, "cond_stage_config": conditioner, "concat": concat},
        **{"schedule": schedule, "prediction": prediction, "scale_factor": scale_factor, "defaults": defaults},
    }
    return Recognised(family.name, "model", {"target": networks.MODEL_TARGET, "params": params}, notes)


def _completed(conditioner: Config | None, unet: Config, first_stage: Config) -> Config | None:
    """Add to the conditioner what only the other two networks show, an image to be concatenated included."""
    image_channels = first_stage["params"]["ddconfig"]["in_channels"]
    if conditioner is None and "context_dim" in unet:
        context = f"a context of width {unet['context_dim']}"
        raise ValueError(f"the UNet attends to {context}, but the file has no encoder for it (cond_stage_model.*)")
    if conditioner is None and unet["in_channels"] == first_stage["params"]["embed_dim"] + image_channels:
        conditioner = {"target": networks.IMAGE_TARGET, "params": {}}  # a low-resolution image, as wide as the latents
    params = {} if conditioner is None else conditioner["params"]
    if kind(conditioner) == "rescaler":
        params["n_stages"] = int(math.log2(_downsampling(first_stage)))  # halvings to the latents' size
    if (numbers := _XL_NUMBERS.get(f"{kind(conditioner)}")) is not None:
        with_numbers = params["embedders"][-1].get("projection_dim", 0) + numbers
        if unet.get("adm_in_channels") != with_numbers:
            found = f"the UNet takes {unet.get('adm_in_channels', 0)} numbers beside the context (label_emb)"
            which = f"with {len(params['embedders'])} text encoders"
            raise ValueError(f"{found}, and Stable Diffusion XL's {which} takes {with_numbers}")
    elif "num_classes" in unet:
        if kind(conditioner) != "openclip" or unet.get("adm_in_channels") != params["projection_dim"]:
            raise ValueError("the UNet takes classes or pooled text (label_emb), which no encoder in the file provides")
        params["pooled"] = True
    return conditioner


def stored_scale_factor(state: State) -> float | None:
    """Return the scale factor that CompVis measured and stored (`scale_by_std`), if the tensors as read have one."""
    stored = state.get("scale_factor")
    if stored is None or stored.is_meta or stored.numel() != 1:
        return None
    value = float(f"{stored.double().item():.7g}")  # float32 has no more digits
    if not 0 < value < math.inf:
        raise ValueError(f"scale_factor in the file is {value}: it must be positive")
    return value


def _prediction(state: State, metadata: Config, facts: Config, asked: str | None, family: Family) -> tuple[str, str]:
    """Return what the UNet predicts, by the best source, and a note of it."""
    mark = next((name for name in ("v_pred", "ztsnr") if name in state), None)
    header = _HEADER_PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower())
    steps = facts.get("global_step")
    trained = _SD2_STEPS.get(steps) if family.name == "sd-v2-v" and isinstance(steps, int) else None
    for prediction, source in (
        (asked, "as asked for"),
        (mark and "v", f"by the mark {mark!r} in the file"),
        (header, "by the file's header"),
        (trained, f"by the file's {steps} training steps"),
    ):
        if prediction is not None:
            return prediction, f"prediction {prediction}, {source}"
    other = "eps" if family.prediction == "v" else "v"
    advice = f"if images are noise, try prediction {other} (--prediction {other})"
    return family.prediction, f"prediction {family.prediction} is assumed, the file does not say: {advice}"


def _schedule(state: State, family: Family) -> tuple[Config, str]:
    """Return `make_schedule`'s arguments, from the file's betas where it has them, and a note."""
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
    candidates: list[Config] = [assumed, assumed | {"zero_terminal_snr": True}, {"name": "cosine", "T": len(betas)}]
    if 0 < start < 1 and 0 < end < 1:
        candidates += [{"name": name} | sizes for name in ("scaled_linear", "linear")]
    for candidate in candidates:
        ab = make_schedule(**candidate).alphas_cumprod
        expected = 1 - ab / torch.cat([ab.new_ones(1), ab[:-1]])
        if len(ab) == len(betas) and torch.allclose(betas, expected, rtol=tolerance, atol=0):
            return candidate, f"noise schedule {_words(candidate)} is read from the file"
    found = f"the file's noise schedule (betas {start:g} to {end:g}, {len(betas)} timesteps)"
    return assumed, f"{found} is of an unknown kind, so that {_words(assumed)} is assumed"


def _words(schedule: Config) -> str:
    span = f" {schedule['start']:g} to {schedule['end']:g}" if "start" in schedule else ""
    zero = ", zero terminal SNR" if schedule.get("zero_terminal_snr", False) else ""
    return f"{schedule['name']}{span}{zero}"


def _heads(family: Family, unet: Config) -> Config:
    """Return the family's attention heads; in smaller models, the most or widest that divide every attending layer."""
    mult = unet["channel_mult"]
    attended = [mult[int(math.log2(factor))] for factor in unet["attention_resolutions"]]
    widths = [unet["model_channels"] * times for times in (*attended, mult[-1])]  # the middle attends too
    return {key: own if key == "legacy" else math.gcd(own, *widths) for key, own in family.heads.items()}


def _downsampling(first_stage: Config) -> int:
    """Return how many pixels a latent is."""
    return 2 ** (len(first_stage["params"]["ddconfig"]["ch_mult"]) - 1)


def _name(config: Config) -> str:
    """Return "kl-f8" or "vq-f4" of a first stage, the kind of a conditioner."""
    return f"{kind(config)}" + (f"-f{_downsampling(config)}" if "ddconfig" in config["params"] else "")


def _sizes(unet: Config, first_stage: Config, conditioner: Config | None) -> str:
    text = "unconditional"
    if conditioner is not None:
        params = conditioner["params"]
        width = next((f" {params[key]} wide" for key in ("width", "n_embed", "embed_dim") if key in params), "")
        text = f"conditioner {kind(conditioner)}{width}"
    return f"UNet {unet['model_channels']} x {unet['channel_mult']}, first stage {_name(first_stage)}, {text}"


def _unet_alone(shapes: Shapes) -> Recognised:
    """Recognise a UNet alone: its family shows in its context and channels."""
    unet = infer_unet(shapes)
    conditioner = {None: None, 1280: "bert"}.get(unet.get("context_dim"), "clip")
    if unet.get("use_linear_in_transformer", False):
        widths = {1280 + numbers: name for name, numbers in _XL_NUMBERS.items()}
        conditioner = widths.get(unet.get("adm_in_channels"), "openclip")
    z = unet["out_channels"]
    concat = find_concat(unet["in_channels"] - z, z, conditioner is not None)
    family = FAMILIES.get((conditioner, "kl" if z == 4 else "vq", concat))
    if family is None:
        sizes = f"{unet['in_channels']} channels in, {z} out, context {unet.get('context_dim', 'none')}"
        raise ValueError(f"the file holds a UNet alone, of an unknown family: {sizes}; {WANTED}")
    params = {"image_size": family.latents} | unet | _heads(family, unet)
    notes = [f"recognised a UNet alone, of {family.title}: {unet['model_channels']} x {unet['channel_mult']}"]
    return Recognised(family.name, "unet", {"target": networks.UNET_TARGET, "params": params}, notes)
