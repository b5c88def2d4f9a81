"""Load models: our own checkpoints, CompVis's single files and diffusers' folders.

The reader of each format is imported when a file needs it: our own file imports none of the others.
"""

from collections.abc import Mapping
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.changes import Change, settings_of_model
from ldm.checkpoint import networks
from ldm.checkpoint.file import CONFIG_KEY, checkpoint_at, file_hash, load_file, read_config
from ldm.checkpoint.networks import Config, Found
from ldm.checkpoint.tensors import State, check_finite, read_tensors
from ldm.checks import ONNX_INDEX, as_path
from ldm.diffusion.denoiser import check_prediction
from ldm.latent_diffusion import LatentDiffusion
from ldm.util import Unfilled, at_most, get_obj_from_str, instantiate_network, pick_device, pick_dtype

SHIPPED = networks.PRETRAINED / "digits.safetensors"
# What a file of one network holds, by its target, and by which option it is loaded beside a model.
PART_OF = {
    networks.KL_TARGET: "first_stage",
    networks.VQ_TARGET: "first_stage",
    networks.UNET_TARGET: "unet",
    networks.TEXT_TARGET: "text",
    networks.SIZED_TEXT_TARGET: "text",
    networks.BERT_TARGET: "text",
}
OPTIONS = {"first_stage": "vae", "unet": "unet", "text": "text_encoder"}
NEEDS = {"first_stage": "embed_dim image_channels downsampling", "unet": "downsampling", "text": "tokenizer"}
MORE_TENSORS = 4096  # than twice the file's, above which a configuration is not even built, to list what does not fit
NO_EMA = "no averaged weights (EMA): load it without ema (--ema)"


def load(
    path: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | str | None = torch.float32,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    unet: str | Path | None = None,
    ema: bool = False,
    prediction: str | None = None,
    vocab: str | Path | None = None,
    variant: str | None = None,
    text_encoder: str | Path | None = None,
) -> LatentDiffusion:
    """Load the model of a checkpoint; without a path, the digits model that ships with the package.

    Args:
        path: a checkpoint of ours, the name of one that ships, a run's folder, a single file of CompVis's kind
            (.safetensors or .ckpt; nothing in it runs), a diffusers or ONNX folder. `model.notes`: what was assumed.
        device, dtype: where the weights go, and as what ("fp16", say; None: as the file has them). On the CPU, in the
            file's own dtype, they stay mapped: they take memory when they are first used, and none of their own.
        config: a yaml, CompVis's or ours, in place of what the file says or is recognised as.
        vae, unet, text_encoder: files or folders that hold that part, whatever else they hold or lack, to be used in
            place of the checkpoint's own.
        ema: take the averaged weights of a training checkpoint (`model_ema.*`), the file that the UNet comes from.
        prediction: what the UNet predicts ("eps", "x0", "v", "flow"), for files that do not say.
        vocab: the WordPiece vocabulary (vocab.txt) of a model with a BERT-style encoder, whose files lack it.
        variant: of a diffusers folder's files, "fp16" say.
    """
    given = {**locals()}
    if path is not None and (as_path("checkpoint", path) / ONNX_INDEX).is_file():
        from ldm.onnx.model import load_onnx

        return load_onnx(Path(path), given)
    return _load(**given)


def _load(path, device, dtype, config, vae, unet, ema, prediction, vocab, variant, text_encoder) -> LatentDiffusion:
    path = SHIPPED if path is None else checkpoint_at(path)
    given = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    vae, unet, text = (None if part is None else checkpoint_at(part, name) for name, part in given.items())
    config, vocab = (None if f is None else as_path(name, f) for name, f in (("config", config), ("vocab", vocab)))
    if prediction is not None:
        check_prediction(prediction)
    replacements = {} if vae is None else {"first_stage": take_part("first_stage", vae)}
    if unet is not None:
        replacements["unet"] = take_part("unet", unet, ema)
    if text is not None:
        replacements["text"] = take_part("text", text)
    found = _complete(path, _open(path, config, ema and unet is None, prediction, variant, replacements), replacements)
    if prediction is not None:
        _set_prediction(path, found.config, prediction)
    if vocab is not None:
        _set_vocabulary(found.config["params"], vocab)
    model = _build(_called(path, replacements), found.config, found.state, pick_device(device), dtype)
    try:
        check_prediction(model.prediction)
        model.schedule  # noqa: B018 - made on first use; a damaged one is an error of the file, not of sampling
    except (ValueError, TypeError) as error:
        raise ValueError(f"checkpoint {str(path)!r} has a damaged configuration: {error}") from None
    if found.words:
        from ldm.conditioning.words import learn

        for word, vectors in found.words.items():
            learn(model.cond_stage_model, word, vectors)
    model.path, model.notes = path, found.notes
    files = {"vae": vae, "unet": unet, "text_encoder": text, "config": config, "vocab": vocab}
    words = {"ema": "ema" if ema else None, "prediction": prediction, "variant": variant}
    model.changes = [Change(name, hash=file_hash(file)) for name, file in files.items() if file is not None]
    model.changes += [Change(name, word) for name, word in words.items() if word is not None]
    model.loaded_settings = settings_of_model(model)
    return model


def load_network(path: str | Path, device: str = "cpu", dtype: torch.dtype | str | None = torch.float32) -> nn.Module:
    """Load any network saved with its configuration: a first stage, a text encoder, a classifier."""
    return _build(_called(path), *load_file(path), pick_device(device), dtype)


def _called(path: str | Path, replacements: Mapping[str, Found] | None = None) -> str:
    """Return what messages call a checkpoint, with the parts that were put into it."""
    return f"checkpoint {str(path)!r}" + "".join(f" (with {new.notes[0]})" for new in (replacements or {}).values())


def _complete(path: Path, found: Found, replacements: Mapping[str, Found]) -> Found:
    """Return a copy of a complete model with its parts exchanged; refuse anything else than such a model."""
    target = found.config.get("target")
    if not _is_model(target):
        option = OPTIONS.get(PART_OF.get(target))
        hint = "" if option is None else f": load it beside a model, as its {option} (--{option.replace('_', '-')})"
        raise ValueError(f"checkpoint {str(path)!r} holds a {target}, not a complete model{hint}")
    if replacements and target != networks.MODEL_TARGET:
        raise ValueError(
            f"checkpoint {str(path)!r} holds a {target}: "
            "only latent diffusion models have --vae, --unet and --text-encoder"
        )
    params, state, notes = deepcopy(found.config["params"]), found.state, found.notes
    for part, new in replacements.items():
        if new.scale_factor not in (None, params["scale_factor"]):
            own = f"the model {str(path)!r} has scale factor {params['scale_factor']:g}"
            given = f"the first stage given has {new.scale_factor:g}"
            raise ValueError(f"{own}, and {given}: they have different latent spaces ({new.notes[0]})")
        if part == "text":
            from ldm.checkpoint.exchange import read_alike

            new = read_alike(params["cond_stage_config"], new)
        params["cond_stage_config" if part == "text" else f"{part}_config"] = new.config
        state, notes = _swapped(state, part, new), [*notes, *new.notes]
    return Found({"target": target, "params": params}, state, notes, words=found.words)


def _set_prediction(path: Path, config: Config, prediction: str) -> None:
    if "prediction" not in signature(get_obj_from_str(config["target"])).parameters:  # a DenoisingGAN, of x0 alone
        found = f"checkpoint {str(path)!r} holds a {config['target']}, which has no choice of what it predicts"
        raise ValueError(f"{found}: load it without prediction (--prediction)")
    config["params"]["prediction"] = prediction


def _is_model(target: str | None) -> bool:
    """Return whether a target is LatentDiffusion, or one of ours that builds on it, such as PixelDiffusion."""
    try:
        return target is not None and issubclass(get_obj_from_str(target), LatentDiffusion)
    except ValueError:
        return False


def _open(
    path: Path,
    config: str | Path | None = None,
    ema: bool = False,
    prediction: str | None = None,
    variant: str | None = None,
    replacements: Mapping[str, Found] | None = None,
    part: str | None = None,
) -> Found:
    """Read a file or folder, whoever wrote it: a model or a part alone, as the configuration's target says.

    part: what alone is wanted, where the others are missing.
    """
    if path.is_dir():
        from ldm.checkpoint.diffusers_folder import read_pipeline, read_vae_folder

        if ema or config is not None:
            raise ValueError(
                f"folder {str(path)!r} has {NO_EMA if ema else 'its own configuration: load it without config'}"
            )
        if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
            if part != "text":
                return read_vae_folder(path)
            from ldm.conditioning.public_clip import read_clip_folder

            return read_clip_folder(path)
        return read_pipeline(path, variant)
    contents = read_tensors(path)
    if variant is not None:
        raise ValueError(f"checkpoint {str(path)!r} is one file: only diffusers' folders have a variant {variant!r}")
    if CONFIG_KEY in contents.metadata and config is None:
        own = read_config(path, contents.metadata)
        if ema:
            raise ValueError(f"checkpoint {str(path)!r} has {NO_EMA}")
        return Found(own, contents.state, [])

    from ldm.checkpoint.compvis import own_name
    from ldm.checkpoint.compvis_file import model_in

    state = contents.state
    for name, new in (replacements or {}).items():  # before it is recognised: some files lack the first stage
        rest = {own: tensor for own, tensor in state.items() if not own_name(own).startswith(networks.PREFIXES[name])}
        state = _swapped(rest, name, new)
    try:
        return model_in(contents._replace(state=state), config, ema, prediction, part)
    except ValueError as error:
        raise ValueError(f"{_called(path, replacements)}: {error}") from None


def take_part(part: str, path: Path, ema: bool = False) -> Found:
    """Read a part out of a file or folder, under its own names: of that part alone, or of a model."""
    config, state, _, scale_factor, _ = _open(path, ema=ema, part=part)
    target = found = config.get("target")
    if target == networks.MODEL_TARGET:
        prefix, params = networks.PREFIXES[part], config["params"]
        state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        if (config := params["cond_stage_config" if part == "text" else f"{part}_config"]) is None:
            raise ValueError(f"{str(path)!r} is an unconditional model, without a text encoder")
        target, scale_factor = config["target"], params["scale_factor"] if part == "first_stage" else None
    module, state = fitted(_called(path), config, state)
    other, called = _is_model(target) or PART_OF.get(target, part) != part, OPTIONS[part].replace("_", " ")
    if other or not all(hasattr(module, name) for name in NEEDS[part].split()):
        raise ValueError(f"{str(path)!r} holds a {found}, which cannot be a model's {called}")
    return Found(config, state, [f"{called}: {path}"], scale_factor)


def _swapped(state: State, part: str, new: Found) -> State:
    prefix = networks.PREFIXES[part]
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return rest | {prefix + name: tensor for name, tensor in new.state.items()}


def _set_vocabulary(params: Config, path: Path) -> None:
    """Give a BERT-style encoder its words; from now on they travel with the model."""
    from ldm.conditioning.bert import read_vocab

    conditioner = params["cond_stage_config"]
    if conditioner is None or conditioner["target"] != networks.BERT_TARGET:
        raise ValueError(f"the vocabulary {str(path)!r} is not needed: the model has no BERT-style encoder")
    conditioner["params"]["vocab"] = read_vocab(path)


def _build(what: str, config: Config, state: State, device: torch.device, dtype: torch.dtype | str | None) -> Any:
    """Build `config` without initialising weights and give it `state`, cast tensor by tensor; frozen, eval mode."""
    dtype = pick_dtype(dtype)
    module, state = fitted(what, config, state)
    for name, tensor in state.items():
        state[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def fitted(what: str, config: Config, state: State) -> tuple[Any, State]:
    """Return what `config` describes, on the meta device, and the tensors for it. ValueError where they do not fit."""
    if "target" not in config:
        raise ValueError(f"{what} has a damaged configuration (it names no target)")
    try:
        with Unfilled(), at_most(2 * len(state) + MORE_TENSORS):
            module = instantiate_network(config)
    except Exception as error:  # a damaged configuration may break a constructor in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]  # torch appends its own stack
        raise ValueError(f"{what} has a configuration that cannot be built: {reason}") from error
    own = module.state_dict()
    if own.keys() != state.keys() and config["target"] == networks.MODEL_TARGET:
        from ldm.checkpoint.compvis import normalise

        state, _ = normalise(state)  # what `save` added for other programs goes again
    expected, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, state))
    if expected != found:
        from ldm.checkpoint.structure import misfits

        raise ValueError(f"{what} does not fit its configuration: {misfits(expected, found)}")
    wrong = sorted(name for name, t in state.items() if t.is_floating_point() != own[name].is_floating_point())
    if wrong:
        some = f"{len(wrong)} tensors, such as {wrong[0]} ({state[wrong[0]].dtype})"
        raise ValueError(f"{what} has integers for floats, or floats for integers, in {some}")
    check_finite(what, state)
    return module, state
