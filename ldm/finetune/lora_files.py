"""LoRA files: read in any of the common namings, written in sd-scripts' ("kohya") or PEFT's, which diffusers reads.

An adapter's alpha is a tensor beside its matrices in sd-scripts' files, and in the header of PEFT's (diffusers from
0.35 on); without either, alpha is the rank. Every adapter here has scale alpha / rank.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import einsum
from torch import Tensor

from ldm.changes import Change
from ldm.checkpoint.file import file_hash
from ldm.checkpoint.tensors import check_finite, read_tensors
from ldm.checkpoint.writing import save_file
from ldm.checks import few
from ldm.finetune.lora import Adapter, Replaced, connect, merge, places, resized
from ldm.finetune.lora_names import (
    PARTS,
    for_xl,
    is_xl,
    layers_of,
    own_spellings,
    parse,
    refuse_other_kinds,
    to_kohya,
    with_usual_levels,
)
from ldm.latent_diffusion import LatentDiffusion
from ldm.saving import vanishing

LORA_FORMATS = ("kohya", "peft")
# diffusers' key in the header: arguments of PEFT's LoraConfig as JSON, each with `unet.` or `text_encoder.` before it
SETTINGS = "lora_adapter_metadata"

ZERO = "it changes nothing: all of its changes are zero"


class LoraFile(NamedTuple):
    """A file's adapters by layer (in the naming of `lora_names`), names of other tensors, header, format, and whether
    it is for Stable Diffusion XL."""

    adapters: dict[str, Adapter]
    others: list[str]
    metadata: dict[str, str]
    format: str
    xl: bool


def read_lora(path: str | Path) -> LoraFile:
    """Read the adapters in a file (safetensors, or .ckpt, .pt and .bin, in which nothing is executed), as stored."""
    contents = read_tensors(path)
    state, metadata = contents.state, contents.metadata
    try:
        refuse_other_kinds(state)
        matrices, others = _by_layer(state)
        if not matrices:
            raise ValueError(f"holds no LoRA weights; it has {', '.join(list(state)[:3])}")
        settings = _settings(Path(path), metadata)
        adapters = {layer: _adapter(layer, own, settings) for layer, own in matrices.items()}
        check_finite("is damaged: it", _matrices(adapters))
    except ValueError as error:
        raise ValueError(f"LoRA {str(path)!r} {error}") from None
    form = "kohya" if any(name.startswith("lora_") for name in state) else "peft"
    return LoraFile(adapters, others, metadata, form, for_xl(adapters, state, metadata))


def holds_lora(path: str | Path) -> bool:
    """Return whether a file is a LoRA of some kind rather than a model. Raises as `read_tensors`."""
    return any(parse(name) is not None for name in read_tensors(path).state)


def _by_layer(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return {layer: {"down": .., "up": .., "alpha": ..}}, and the names of all other tensors."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others = []
    for key, tensor in state.items():
        parsed = parse(key)
        if parsed is None or parsed[1] in layers[parsed[0]]:
            others.append(key)
        else:
            layers[parsed[0]][parsed[1]] = tensor
    alone = [layer for layer, own in layers.items() if own.keys() <= {"alpha"}]
    others += [f"{layer}.alpha" for layer in alone if layers[layer]]
    return {layer: own for layer, own in layers.items() if layer not in alone}, others


def _adapter(layer: str, own: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Adapter:
    missing = sorted({"down", "up"} - own.keys())
    if missing:
        raise ValueError(f"is damaged: {layer} lacks its matrix {missing[0]}")
    down, up = own["down"], own["up"]
    try:
        if "mid" in own:  # a convolution in three factors (LyCORIS's Tucker decomposition), of which two make one
            down = einsum(own["mid"].float(), down.float().flatten(1), "r s h w, s i -> r i h w")
        alpha = own["alpha"].item() if "alpha" in own else _alpha(settings, layer, len(down))
        return Adapter(down, up.to(down.dtype), alpha).requires_grad_(False)
    except (ValueError, TypeError, RuntimeError) as error:  # torch's and einops's are RuntimeErrors
        raise ValueError(f"is damaged at {layer}: {error}") from None


def _matrices(layers: Mapping[str, Adapter]) -> dict[str, Tensor]:
    return {f"{layer}.{end}": matrix for layer, own in layers.items() for end, matrix in own.named_parameters()}


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's settings, as diffusers writes them in a header, or from adapter_config.json beside the file."""
    config = path.with_name("adapter_config.json")
    try:
        if SETTINGS in metadata:
            return dict(json.loads(metadata[SETTINGS]))
        if path.name.startswith("adapter_model.") and config.is_file():
            own = json.loads(config.read_bytes())
            return {f"{part}.{key}": value for part in PARTS for key, value in own.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is damaged: its settings cannot be read ({error})") from None
    return {}


def _alpha(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the alpha with which alpha / rank is the layer's scale, by PEFT's settings."""
    part, _, name = layer.partition(".")
    alpha, patterns = settings.get(f"{part}.lora_alpha", rank), settings.get(f"{part}.alpha_pattern") or {}
    try:  # patterns match as PEFT's
        matching = (own for pattern, own in dict(patterns).items() if re.match(rf"(.*\.)?({pattern})$", name))
        alpha = float(next(matching, alpha))
    except (ValueError, TypeError, re.error) as error:
        raise ValueError(f"its settings of alpha cannot be read ({error})") from None
    # rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) has alpha / sqrt(rank) instead
    return alpha * math.sqrt(rank) if settings.get(f"{part}.use_rslora", False) else alpha


def load_lora(path: str | Path, model: LatentDiffusion, strength: float = 1.0) -> tuple[dict[str, Adapter], list[str]]:
    """Return a file's adapters, in float32, by our names of the model's layers, and notes on what has no place."""
    found, lora = places(model), read_lora(path)
    ours = own_spellings(model) | layers_of(model)
    adapters, left = {}, list(lora.others)
    for layer, adapter in lora.adapters.items():
        name = ours.get(layer)
        if name is None or name in adapters:
            left.append(layer)
            continue
        shape = found[name].weight.shape
        down, up = (_shaped(matrix.detach().float(), len(shape)) for matrix in (adapter.down, adapter.up))
        if (len(up), *down.shape[1:]) != shape:
            raise ValueError(
                f"LoRA {str(path)!r} is for a model of another architecture: it changes a weight "
                f"{(len(up), *down.shape[1:])} of {layer}, which is {tuple(shape)} here"
            )
        adapters[name] = Adapter(down, up, adapter.alpha, strength).requires_grad_(False)
    if not adapters:
        raise ValueError(f"LoRA {str(path)!r} is for a model of another architecture: this one has no {few(left)}")
    notes = [f"LoRA {path}: {ZERO}"] if all(adapter.is_zero for adapter in adapters.values()) else []
    if left:
        notes += [f"LoRA {path}: {len(left)} of its names have no place in this model and are left out: {few(left)}"]
    return adapters, notes


def _shaped(matrix: Tensor, ndim: int) -> Tensor:
    """Return a linear layer's matrix as a 1 x 1 convolution's, or the reverse; both compute the same."""
    if ndim == 4 and matrix.ndim == 2:
        return matrix[:, :, None, None]
    return matrix.flatten(1) if ndim == 2 and math.prod(matrix.shape[2:]) == 1 else matrix


def apply_lora(model: LatentDiffusion, path: str | Path, strength: float = 1.0) -> dict[str, Adapter]:
    """Add a file's adapters to the model; several files' changes add up. Notes go to `model.notes`.

    Each adapter's `strength` may change at any time, and `lora.detach` removes them; after `merge_lora` instead, the
    model samples faster. Errors as `load_lora`.
    """
    adapters, notes = load_lora(path, model, strength)
    connect(model, adapters)
    model.notes += notes
    model.changes.append(AppliedLora(Path(path).stem, file_hash(Path(path)), next(iter(adapters.values()))))
    return adapters


def merge_lora(
    model: LatentDiffusion, path: str | Path, strength: float = 1.0, dtype: torch.dtype | None = None
) -> Replaced:
    """Merge what `apply_lora` adds into the model's weights; `lora.restore` undoes it with the result, bit for bit.

    dtype: that the weights are rounded to in the end; a note says where this loses the change.
    """
    kept = merge(model, apply_lora(model, path, strength), dtype)
    if kept.differ * 10 < kept.changed:
        last = next(model.model.parameters()).dtype if dtype is None else dtype
        lost = f"{1 - kept.differ / kept.changed:.1%} of the weights that it changes stay the same in {last}"
        model.notes.append(f"LoRA {path}: its change is lost in rounding: {lost}; float32 keeps it")
    return kept


class AppliedLora(NamedTuple):
    """An entry of `model.changes`: a LoRA as it is now in the model, as one of its adapters tells."""

    name: str
    hash: str
    adapter: Adapter

    def current(self) -> Change | None:
        """Return the change, or None once the LoRA is detached or its merge undone."""
        strength = self.adapter.applied
        return None if strength is None else Change("lora", self.name, self.hash, strength)


def split_strength(text: str) -> tuple[Path, float]:
    """Return (file, strength) of `FILE[:STRENGTH]`; the strength is 1 if not given, and may be negative."""
    head, colon, tail = text.rpartition(":")
    if head and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", tail):
        if not math.isfinite(float(tail)):
            raise ValueError(f"the strength {tail!r} of {head} is not a finite number")
        return Path(head), float(tail)
    return Path(text), 1.0


def save_lora(
    path: str | Path,
    adapters: Mapping[str, Adapter],
    model: LatentDiffusion,
    format: str = "kohya",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write adapters atomically, and return notes; equal ones make equal files. Strengths are not written.

    Args:
        adapters: by the names that `lora.attach` gives them for a LatentDiffusion.
        format: "kohya", which nearly every program reads, or "peft", diffusers' own, in which only diffusers from 0.35
            on sees an alpha that is not the rank.
        dtype: of the matrices; None is the adapters' own.
        metadata: further texts for the header.
    """
    return _write(path, _by_common_name(adapters, model), format, dtype, metadata, is_xl(model))


def kohya_tensors(
    adapters: Mapping[str, Adapter], model: LatentDiffusion, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the tensors of `save_lora`'s kohya format, in which they are complete without a header."""
    return _tensors(_by_common_name(adapters, model), "kohya", dtype, is_xl(model))


def _by_common_name(adapters: Mapping[str, Adapter], model: LatentDiffusion) -> dict[str, Adapter]:
    theirs = {own: layer for layer, own in layers_of(model).items()}
    nameless = [name for name in adapters if name not in theirs]
    if nameless:
        raise ValueError(f"LoRA files have no name for {len(nameless)} of the layers ({', '.join(nameless[:3])})")
    return {theirs[name]: adapter for name, adapter in adapters.items()}


def _write(
    path: str | Path,
    layers: Mapping[str, Adapter],
    format: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
    xl: bool,
) -> list[str]:
    """Write adapters by layers under our common names, and return notes."""
    if format not in LORA_FORMATS:
        raise ValueError(f"LoRA format {format!r} is unknown: it is one of {', '.join(LORA_FORMATS)}")
    check_finite("the LoRA", _matrices(layers), dtype)
    notes = vanishing(_matrices(layers), dtype)
    if not notes and all(adapter.is_zero for adapter in layers.values()):
        notes = [ZERO]
    texts = {**(metadata or {}), "format": "pt"}
    if format == "kohya":
        ranks, alphas = {a.rank for a in layers.values()}, {a.alpha for a in layers.values()}
        texts["ss_network_module"] = "networks.lora"
        texts["ss_network_dim"] = str(*ranks) if len(ranks) == 1 else "Dynamic"  # sd-scripts' own word
        texts["ss_network_alpha"] = str(*alphas) if len(alphas) == 1 else "Dynamic"
    else:
        texts[SETTINGS] = json.dumps(_peft_settings(layers), sort_keys=True)
    save_file(path, _tensors(layers, format, dtype, xl), metadata=texts)
    return notes


def _tensors(layers: Mapping[str, Adapter], format: str, dtype: torch.dtype | None, xl: bool) -> dict[str, Tensor]:
    """Return a file's tensors: matrices in `dtype` and, in kohya's format, alphas in float32."""
    state = {}
    for layer, adapter in layers.items():
        down, up = (m.detach() if dtype is None else m.detach().to(dtype) for m in (adapter.down, adapter.up))
        if format == "kohya":
            name, alpha = to_kohya(layer, xl), torch.tensor(float(adapter.alpha))
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
        else:
            state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return state


def _peft_settings(layers: Mapping[str, Adapter]) -> dict[str, Any]:
    """Return LoraConfig's arguments for each part: its most common rank and alpha, and the layers with others."""
    settings = {}
    for part in PARTS:
        own = {n.removeprefix(f"{part}."): a for n, a in layers.items() if n.startswith(f"{part}.")}
        # transformers has had CLIP with `text_model.` and without; PEFT takes a name's end for the name
        own = {name.removeprefix("text_model."): adapter for name, adapter in own.items()}
        if not own:
            continue
        for name, attribute in (("r", "rank"), ("lora_alpha", "alpha")):
            values = {layer: getattr(adapter, attribute) for layer, adapter in own.items()}
            ((usual, _),) = Counter(values.values()).most_common(1)
            settings[f"{part}.{name}"] = usual
            others = {layer: value for layer, value in values.items() if value != usual}
            settings[f"{part}.{attribute}_pattern"] = others
        settings[f"{part}.target_modules"] = sorted(own)
    return settings


def rewrite(
    source: str | Path,
    target: str | Path,
    rank: int | None = None,
    format: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write a LoRA file in another format, of a smaller rank, or in another dtype; return notes on the result.

    No model is needed: CompVis's block names become diffusers', as in Stable Diffusion 1, 2 and XL.

    rank: layers of a larger rank get the nearest change of this one.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    lora = read_lora(source)
    try:
        layers = with_usual_levels(lora.adapters, lora.xl)
    except ValueError as error:
        raise ValueError(f"LoRA {str(source)!r} is not for Stable Diffusion 1, 2 or XL: {error}") from None
    notes = [f"left out: {', '.join(lora.others)}"] if lora.others else []
    if rank is not None:
        smaller = {layer: resized(adapter, rank) for layer, adapter in layers.items()}
        notes.append(_energy(smaller, rank))
        layers = {layer: own.adapter for layer, own in smaller.items()}
    # The header's hashes and settings of the old file go; its record of the training stays.
    texts = {k: v for k, v in lora.metadata.items() if k != SETTINGS and not re.match(r"sshs_|modelspec\.hash", k)}
    form = lora.format if format is None else format
    return notes + _write(target, layers, form, dtype, texts, lora.xl)


def _energy(layers: Mapping[str, Any], rank: int) -> str:
    kept, total = (sum(getattr(own, name) for own in layers.values()) for name in ("kept", "total"))
    shares = {layer: own.kept / own.total if own.total > 0 else 1.0 for layer, own in layers.items()}
    least = min(shares, key=lambda layer: shares[layer])
    share = kept / total if total > 0 else 1.0
    return (
        f"rank {rank}: {share:.2%} of the change (its squared norm) is kept in all {len(layers)} layers, and at least "
        f"{shares[least]:.2%} in each ({least})"
    )
