"""CompVis's diffusion models that give their UNet more channels than the latents: `LatentInpaintDiffusion`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.compvis.base import DDPM
from ldm.compvis.ddpm import LatentDiffusion

INPUT_WEIGHTS = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")


class LatentFinetuneDiffusion(LatentDiffusion):
    """The base of models that go on from a checkpoint whose UNet has fewer input channels.

    Args:
        concat_keys: Of the batch: what the UNet has in the other channels.
        finetune_keys: Weights of which `ckpt_path` gives the first `keep_finetune_dims` input channels; the others
            start at zero. None loads all weights as they are.
        c_concat_log_start, c_concat_log_end: Of the other channels, those that the log shows decoded.
    """

    def __init__(
        self, concat_keys: Sequence[str], finetune_keys: Sequence[str] | None = INPUT_WEIGHTS,
        keep_finetune_dims: int = 4, c_concat_log_start: int | None = None, c_concat_log_end: int | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.concat_keys, self.finetune_keys, self.keep_dims = concat_keys, finetune_keys, keep_finetune_dims
        self.c_concat_log_start, self.c_concat_log_end = c_concat_log_start, c_concat_log_end
        super().__init__(**settings)

    def _fitted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.state_dict()
        for name in set(self.finetune_keys or ()) & own.keys() & state.keys():
            wide = torch.zeros_like(own[name])
            wide[:, : self.keep_dims] = state[name][:, : self.keep_dims]
            state[name] = wide
        return state

    def log_images(self, batch: Mapping[str, Any], N: int = 8, *args: Any, **options: Any) -> dict[str, Tensor]:
        log = super().log_images(batch, N, *args, **options)
        if self.c_concat_log_start is not None or self.c_concat_log_end is not None:
            cond = self.get_input(batch, self.first_stage_key, bs=N)[1]
            shown = cond["c_concat"][0][:, self.c_concat_log_start : self.c_concat_log_end]
            log["c_concat_decoded"] = self.decode_first_stage(shown)
        return log


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Also gives its UNet the mask, at the latents' size, and the latents of the masked image: `concat_keys`."""

    def __init__(
        self, concat_keys: Sequence[str] = ("mask", "masked_image"), masked_image_key: str = "masked_image",
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(concat_keys, **settings)
        self.masked_image_key, self.concat = masked_image_key, "mask_latents"

    @torch.no_grad()
    def get_input(  # ty: ignore[incompatible-method-override]  # CompVis's has another order, too
        self, batch: Mapping[str, Any], k: str, return_first_stage_outputs: bool = False, **options: Any
    ) -> list[Any]:
        options |= {"force_c_encode": True, "return_original_cond": True}
        z, c, *rest = super().get_input(batch, k, return_first_stage_outputs=True, **options)
        parts = []
        for key in self.concat_keys:
            part = DDPM.get_input(self, batch, key)[: len(z)].to(z)
            is_image = key == self.masked_image_key
            encoded = self.get_first_stage_encoding(self.encode_first_stage(part)) if is_image else part
            parts.append(F.interpolate(encoded, size=z.shape[-2:]))  # (b, 1 or z, h, w)
        cond = {"c_concat": [torch.cat(parts, dim=1)], "c_crossattn": [c]}
        return [z, cond, *(rest if return_first_stage_outputs else [])]
