"""The image half of a CLIP: not needed to generate, only to measure how images agree with captions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class ImageEncoder(nn.Module):
    """open_clip's image tower: images (b, c, h, w) in [-1, 1], of one or three channels, -> unit vectors (b, d).

    Args:
        vision: open_clip's vision_cfg.
        projection_dim: d.
    """

    def __init__(self, vision: Mapping[str, Any], projection_dim: int) -> None:
        super().__init__()
        from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

        text = CLIPTextCfg(width=8, heads=1, layers=1, vocab_size=8, context_length=4)  # a text half must be there
        self.visual = CLIP(projection_dim, CLIPVisionCfg(**vision), text).visual

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.visual(images.expand(-1, 3, -1, -1)), dim=-1)
