"""What can be measured on a folder of own images, of which no judge or feature network exists.

Half of the images, chosen at random, are the reference: a model generates an image for the caption of each. The other
half is what real images reach in their place. Distances are between pixels, for the Fréchet distance averaged to
AVERAGED x AVERAGED: they see layout and colours, not what an image shows, and compare models of the same folder only.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.folder import Folder
from ldm.evaluation.distances import memorisation, nearest_training_distance, precision_recall, quantiles
from ldm.evaluation.frechet import frechet_distance, moments
from ldm.evaluation.reference import measure_floor
from ldm.images import to_uint8
from ldm.models.perceptual import psnr
from ldm.training.conditioner import shown_classes
from ldm.training.latents import posterior

AVERAGED = 8


class Halves:
    """The images of a folder, uint8 (n, c, h, w), in two halves: of the reference, with captions, and the others."""

    def __init__(self, root: Path, size: tuple[int, int], channels: int, reads: str = "caption") -> None:
        """Read a folder.

        size: (width, height) that the model makes; images are cropped to its shape.
        reads: what else of the images, "caption", "label" (whose name is then the caption) or "".
        """
        data = Folder(root, size[0], channels, caption="", buckets=[size], reads=("image", reads))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        images = torch.stack([to_uint8(data[i]["image"]) for i in order])
        half = len(order) // 2
        if half < 10:
            raise ValueError(f"{root} holds {len(order)} images: at least 20 are needed to measure by")
        self.images, self.others = images[:half], images[half:]
        some = [data.without_image(i) for i in order[:half]]
        self.captions = [data.classes[one["label"]] if reads == "label" else one["caption"] for one in some if reads]


def features(images: Tensor) -> Tensor:
    """Return uint8 images (n, c, h, w) as features (n, d): pixels in [-1, 1], averaged to AVERAGED x AVERAGED."""
    return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, AVERAGED).flatten(1)


@torch.inference_mode()
def encode(encoder: Any, images: Tensor) -> Tensor:
    """Return the unit vectors (n, d), float32, of uint8 images (n, c, h, w) by an `ImageEncoder`."""
    return torch.cat([encoder(batch.float() / 127.5 - 1).float() for batch in images.split(100)])


@torch.inference_mode()
def report_agreement(model: Any, encoder: Any, images: Tensor, halves: Halves) -> dict[str, Any]:
    """Return mean cosines of captions and images by the model's own CLIP; those of other captions are chance."""
    cond = model.cond_stage_model(halves.captions[: len(images)])
    if "c_adm" not in cond:
        raise ValueError("the model's text encoder gives no pooled text, by which CLIP compares texts with images")
    texts = F.normalize(cond["c_adm"].float().cpu(), dim=-1)
    cosines, captions = encode(encoder, images) @ texts.T, halves.captions
    other = torch.tensor([[a != b for b in captions[: len(images)]] for a in captions[: len(images)]])
    real = (encode(encoder, halves.images[: len(images)]) * texts).sum(1)
    return {
        "by": "the model's own CLIP, which was trained on captions such as these and flatters the model",
        "own_caption": cosines.diagonal().mean().item(),
        "other_captions": cosines[other].mean().item(),
        "real_own_caption": real.mean().item(),
    }


def report_images(images: Tensor, halves: Halves) -> dict[str, Any]:
    """Return the figures of generated images, uint8 (n, c, h, w), each beside what as many real ones reach."""
    made, real, n = features(images), features(halves.images), len(images)
    floor = measure_floor(real, features(halves.others), n)
    distance, found = frechet_distance(*moments(made), *moments(real)), precision_recall(real[:n], made)
    training = torch.cat([halves.images, halves.others])
    between = quantiles(nearest_training_distance(halves.images, halves.others))
    return {
        "features": f"pixels, averaged to {AVERAGED} x {AVERAGED}",
        "frechet": {"distance": distance, "floor": floor.frechet, "ratio": distance / floor.frechet},
        "precision_recall": found._asdict() | {"real_precision": floor.precision, "real_recall": floor.recall},
        "memorisation": memorisation(nearest_training_distance(images, training), *between)._asdict(),
    }


@torch.inference_mode()
def report_reconstruction(autoencoder: Any, images: Tensor, batch_size: int) -> tuple[dict[str, Any], Tensor]:
    """Return the error of reconstructed images, uint8 (n, c, h, w), and these reconstructions."""
    device, made = next(autoencoder.parameters()).device, []
    for batch in images.split(batch_size):
        decoded = autoencoder.decode(posterior(autoencoder, (batch.float() / 127.5 - 1).to(device))[0])
        made.append(to_uint8(decoded).cpu())
    result = torch.cat(made)
    ratios = psnr(result / 127.5 - 1, images / 127.5 - 1)
    figures = {"mean": ratios.mean().item(), "first_percentile": ratios.quantile(0.01).item()}
    return {"psnr": figures}, result


def read_for(model: Any) -> str:
    """Return what a folder must have of its images besides them: "caption", "label", or "" for nothing."""
    conditioner = model.cond_stage_model
    if conditioner is None or hasattr(conditioner, "n_classes"):
        return "label" if getattr(conditioner, "names", None) else ""
    return "caption"


def prompts_of(model: Any, halves: Halves, n: int) -> list[Any]:
    """Return the first n captions, or names of classes, or numbers of classes in turn, as the model is conditioned."""
    conditioner = model.cond_stage_model
    if hasattr(conditioner, "n_classes") and not halves.captions:
        return shown_classes(conditioner, n)
    return halves.captions[:n] or [""] * n
