"""The VQ autoencoder of latent diffusion, a VQGAN (Esser et al. 2021; Rombach et al. 2022, section 3.1), with CompVis's
names."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ldm.checks import Entries, Width
from ldm.models.autoencoder import Autoencoder, require_unset
from ldm.models.quantize import VectorQuantizer

Info = tuple[None, None, Tensor]  # of VectorQuantizer; the last entry is the codebook indices, int64 (b h w)


class VQModel(Autoencoder):
    """Pixels in [-1, 1] <-> latents from a codebook of `n_embed` vectors of width `embed_dim`: the form that trains.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        others: of CompVis's configs, not used: losses and averages belong to training, `ldm.load` reads checkpoints.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: dict[str, Any] | None = None,
        n_embed: Entries | None = None,
        embed_dim: Width | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,
        scheduler_config: dict[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
    ) -> None:
        require_unset(ckpt_path=ckpt_path, colorize_nlabels=colorize_nlabels)
        require_unset(batch_resize_range=batch_resize_range, remap=remap, sane_index_shape=sane_index_shape)
        if n_embed is None or embed_dim is None:
            raise ValueError(f"n_embed is {n_embed} and embed_dim {embed_dim}: a codebook needs its size and its width")
        if ddconfig.get("double_z", True):
            raise ValueError("ddconfig needs double_z false: a VQ autoencoder's encoder gives no log variances")
        super().__init__(ddconfig, embed_dim)
        self.n_embed = n_embed
        self.quantize = VectorQuantizer(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Map pixels (b, c, h, w) to the latents before quantization (b, embed_dim, h / f, w / f)."""
        return self.quant_conv(self.encoder(x.to(self.quant_conv.weight.dtype)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Info]:
        """Map pixels (b, c, h, w) to quantized latents (b, embed_dim, h / f, w / f), codebook loss () and indices."""
        return self.quantize(self.encode_to_prequant(x))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Return pixels (b, c, h, w) of codebook indices, int64 (b, h / f, w / f)."""
        return Autoencoder.decode(self, self.quantize.get_codebook_entry(code_b))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Return the reconstruction (b, c, h, w) of pixels, the codebook loss (), and on request the indices."""
        quantized, loss, (_, _, indices) = self.quantize(self.encode_to_prequant(input))
        image = Autoencoder.decode(self, quantized)  # not the subclass's, which quantizes
        return (image, loss, indices) if return_pred_indices else (image, loss)


class VQModelInterface(VQModel):
    """VQModel as a first stage: latents are those before quantization, which becomes part of the decoder."""

    def encode(self, x: Tensor) -> Tensor:
        """Map pixels (b, c, h, w) to raw (unscaled) latents before quantization (b, embed_dim, h / f, w / f)."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Decode raw latents (b, embed_dim, h / f, w / f) -> pixels (b, c, h, w), quantized first by default."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])
