"""The networks that the diffusion stage only uses, out of the files that hold them, and what they made of texts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.batching import distinct_prompts
from ldm.checkpoint.file import checkpoint_at
from ldm.latent_diffusion import Conditioning
from ldm.loading import take_part

# Of embeddings that are kept: those of 21,000 captions of digits, nearly all; of 1,100 of Stable Diffusion 1's.
TEXT_BYTES = 2**28
POOLED = ("num_classes", "adm_in_channels")  # of a UNet that takes pooled text


def read_first_stage(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of an autoencoder: out of a run's folder, or whatever --vae takes."""
    return take_part("first_stage", checkpoint_at(path))[:2]


def read_text_stage(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of a text encoder, or of a model's, or of a CLIP in a folder of transformers."""
    return take_part("text", checkpoint_at(path))[:2]


def match_pooled(
    unet_config: Mapping[str, Any], pooled: bool | None, cond_stage: str | Path, given: bool
) -> dict[str, Any]:
    """Return the UNet's configuration, without pooled text unless wanted. ValueError where the encoder differs."""
    params = {k: v for k, v in (unet_config.get("params") or {}).items() if pooled is not False or k not in POOLED}
    if given != ("num_classes" in params):
        raise ValueError(
            f"the text encoder {str(cond_stage)!r} and the UNet differ about pooled text: train both stages with "
            "the same stage.params.pooled (false leaves num_classes and adm_in_channels out)"
        )
    return {**unet_config, "params": params}


class RecentTexts:
    """Conditioning of texts by a frozen encoder, which keeps that of the latest ones in memory.

    encode: distinct texts -> conditioning, of which no row depends on the others, as of `encode_texts`.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Conditioning]) -> None:
        self.encode = encode
        self.kept: dict[tuple[bool, str], Conditioning] = {}  # the latest last

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        distinct, which = distinct_prompts(texts)
        cast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")  # which changes the bits
        rows: dict[str, Any] = {text: self.kept.pop((cast, text), None) for text in distinct}
        absent = [text for text, row in rows.items() if row is None]
        made = self.encode(absent) if absent else {}
        for i, text in enumerate(absent):
            rows[text] = {name: value[i].clone() for name, value in made.items()}
        self.kept |= {(cast, text): row for text, row in rows.items()}
        most = max(TEXT_BYTES // sum(part.nbytes for part in rows[distinct[0]].values()), 1)
        for key in list(self.kept)[: max(len(self.kept) - most, 0)]:
            del self.kept[key]
        found = {name: torch.stack([rows[text][name] for text in distinct]) for name in rows[distinct[0]]}
        return {name: value[which] for name, value in found.items()}
