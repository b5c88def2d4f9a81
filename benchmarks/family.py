"""Measure what a model of configs/family makes of its condition: a class, a small image, a mask, a map or a layout.

python -m benchmarks.family --ckpt runs/family/upscale/model.safetensors --image upscale.png

What is measured follows from what the model is conditioned on, on MNIST's test images or scenes of them:
    class        how many digits the judge reads as the class
    small image  PSNR to the large image, and how many digits the judge reads right, beside bicubic enlargement
    mask         whether what is kept stays to the byte, and the seam: the mean step across the mask's edge over that of
                 the real images, where 1 is invisible, beside a part of another image, pasted
    map, layout  how many digits (as the judge reads them) and colours are right in their boxes, the intersection over
                 union of their ink with the map's, or of its bounding box with the layout's; beside the real scenes
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import Parser, check_writable, int_range
from ldm.inference.options import add_model_options, load_model
from ldm.program import run

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.latent_diffusion import LatentDiffusion

MARGIN = 3  # pixels around a box in which its ink is looked for: half of what lies between two digits of a scene


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_model_options(parser)
    add = parser.add_argument
    add("--n", type=int_range(10), default=300, metavar="N", help="images (300)")
    add("--steps", type=int_range(1), metavar="N", help="denoising steps (the model's own)")
    add("--scale", type=float, metavar="X", help="guidance scale (the model's own)")
    add("--data", metavar="DIR", help="folder of MNIST (LDM_DATA, or ./data)")
    add("--image", type=Path, metavar="FILE", help="show the first images: conditions, results, real ones")
    args = parser.parse_args(argv)
    check_writable(args.image)  # now, not after minutes of work
    print(json.dumps(measure(load_model(args), args), indent=1))


def measure(model: "LatentDiffusion", args: argparse.Namespace) -> dict[str, Any]:
    """Generate for the conditions of test images, and return the figures."""
    import torch

    from ldm.evaluation.networks import JUDGE, load_image_network

    torch.manual_seed(0)
    judge = load_image_network(JUDGE)
    reads = "mask" if model.concat is not None else model.cond_stage_model.reads
    samples = test_samples(model, reads, args)
    kind = {"label": of_classes, "image": of_small_images, "mask": of_masks, "map": of_scenes, "boxes": of_scenes}
    return {"n": args.n, "steps": args.steps, "scale": args.scale} | kind[reads](model, samples, judge, args)


def test_samples(model: "LatentDiffusion", reads: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return test samples of the model's size and channels: digits, or scenes of them."""
    from ldm.data.mnist import MNIST

    if model.image_channels == 1:
        data: Any = MNIST(args.data, "test", first=args.n, pad=model.defaults["height"] == 32)
    else:
        from ldm.data.scenes import Scenes

        data = Scenes(args.n, seed=1, root=args.data, split="test", reads=("image", "boxes", "map"))
    return [data[i] for i in range(args.n)]


def generate(model: "LatentDiffusion", prompts: Any, args: argparse.Namespace, **more: Any) -> "Tensor":
    """Return generated pixels in [-1, 1], (n, c, h, w)."""
    import torch

    from ldm.data.transforms import to_tensor

    images = model.generate(prompts, steps=args.steps, scale=args.scale, batch_size=100, **more)
    return torch.stack([to_tensor(image) for image in images])


def of_classes(model: Any, samples: Sequence[Any], judge: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    labels = torch.tensor([sample["label"] for sample in samples])
    made = generate(model, labels, args)
    show(args.image, [made])
    real = torch.stack([sample["image"] for sample in samples])
    return {"accuracy": read(judge, made, labels), "of real images": read(judge, real, labels)}


def of_small_images(model: Any, samples: Sequence[Any], judge: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from ldm.models.perceptual import psnr

    real = torch.stack([sample["image"] for sample in samples])
    small = F.adaptive_avg_pool2d(real, [side // model.downsampling for side in real.shape[-2:]])
    small = ((small + 1) * 127.5).round() / 127.5 - 1  # as a file has it
    made = generate(model, small, args)
    bicubic = F.interpolate(small, scale_factor=model.downsampling, mode="bicubic").clamp(-1, 1)
    with torch.inference_mode():
        limit = model.decode(model.encode(real, mode=True)).clamp(-1, 1).cpu()
    show(args.image, [F.interpolate(small, scale_factor=model.downsampling), bicubic, made, real])
    found = {}
    for name, images in (("made", made), ("bicubic", bicubic), ("first stage alone", limit)):
        found[name] = {"psnr": psnr(images, real).mean().item()}
        if "label" in samples[0]:
            labels = torch.tensor([sample["label"] for sample in samples])
            found[name]["accuracy"] = read(judge, images, labels)
    again = F.adaptive_avg_pool2d(made, small.shape[-2:])
    return found | {"psnr of the result made small, to what was given": psnr(again, small).mean().item()}


def of_masks(model: Any, samples: Sequence[Any], judge: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from PIL import Image

    from ldm.images import to_pil, to_uint8
    from ldm.training.masks import random_masks
    from ldm.training.share import BatchShare

    real = torch.stack([sample["image"] for sample in samples])
    masks = random_masks(len(real), *real.shape[-2:], BatchShare())
    masks = masks * (masks.mean((1, 2, 3), keepdim=True) < 0.6)  # something is kept
    grey = [Image.fromarray((255 * mask[0]).byte().numpy()) for mask in masks]
    made = generate(model, [""] * len(real), args, image=to_pil(real), mask=grey)
    changed = ((to_uint8(made) != to_uint8(real)) * (1 - masks)).sum().item()
    pasted = torch.where(masks > 0, real.flip(0), real)  # of other images
    show(args.image, [torch.where(masks > 0, 0.0, real), made, real])
    found = {
        "pixels changed that the mask keeps": int(changed),
        "masked": masks.mean().item(),
        "seam": seam(made, masks) / seam(real, masks),
        "seam of another image's part": seam(pasted, masks) / seam(real, masks),
    }
    if "label" in samples[0]:
        labels, black = torch.tensor([sample["label"] for sample in samples]), torch.where(masks > 0, -1.0, real)
        found["accuracy"], found["accuracy of the masked images"] = (read(judge, x, labels) for x in (made, black))
    return found


def seam(images: "Tensor", masks: "Tensor") -> float:
    """Return the mean difference of neighbouring pixels of which one is masked."""
    total = count = 0.0
    for axis in (2, 3):
        across = masks.diff(dim=axis).abs()
        total, count = total + (images.diff(dim=axis).abs() * across).sum().item(), count + across.sum().item()
    return total / count


def of_scenes(model: Any, samples: Sequence[Any], judge: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    reads = model.cond_stage_model.reads
    real = torch.stack([sample["image"] for sample in samples])
    made = generate(model, torch.stack([sample[reads] for sample in samples]), args)
    conditions = [torch.stack([sample["map"] for sample in samples])[:, None].clamp(max=1) * 2.0 - 1]
    show(args.image, [conditions[0].expand(-1, 3, -1, -1), made, real])
    with torch.inference_mode():
        limit = model.decode(model.encode(real, mode=True)).clamp(-1, 1).cpu()
    found = {}
    for name, images in (("made", made), ("real", real), ("first stage alone", limit)):
        found[name] = judge_boxes(images, samples, judge)
    return found


def judge_boxes(images: "Tensor", samples: Sequence[Any], judge: Any) -> dict[str, float]:
    """Return how many digits and colours are right in their boxes, and how well ink covers map and boxes."""
    import numpy as np
    import torch

    from ldm.evaluation.networks import classify
    from ldm.evaluation.scenes import CONTRAST, colour_of, glyph

    glyphs, wanted_classes, colours, boxes, maps = [], [], [], [], []
    for image, sample in zip(images, samples, strict=True):
        pixels = ((image + 1) * 127.5).permute(1, 2, 0).numpy()
        middle = np.median(pixels.reshape(-1, 3), axis=0)
        strength = np.abs(pixels - middle).max(2)  # (h, w)
        ink, wanted = strength > CONTRAST, sample["map"].numpy() > 0
        maps.append((ink & wanted).sum() / max((ink | wanted).sum(), 1))
        for left, top, right, bottom, number in sample["boxes"].tolist():
            if number < 0:
                continue
            x, y = max(left - MARGIN, 0), max(top - MARGIN, 0)
            part = strength[y : bottom + MARGIN, x : right + MARGIN]
            rows, columns = np.nonzero(part > CONTRAST)
            wanted_classes.append(number)
            if len(rows) == 0:
                boxes.append(0.0)
                colours.append(-1)
                glyphs.append(np.zeros((28, 28), np.uint8))
                continue
            found = (x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1)
            boxes.append(overlap(found, (left, top, right, bottom)))
            inside = slice(found[1], found[3]), slice(found[0], found[2])
            part = strength[inside]
            colours.append(colour_of(pixels[inside] - middle, part, middle)[0])
            glyphs.append(glyph((255 * np.clip(part / np.quantile(part, 0.95), 0, 1)).astype(np.uint8)))
    classes = torch.tensor(wanted_classes)
    digits_right = classify(judge, torch.from_numpy(np.stack(glyphs))) == classes % 10
    colours_right = torch.tensor(colours) == classes // 10
    shares = {"digits": digits_right.float().mean().item(), "colours": colours_right.float().mean().item()}
    found = {f"{what} right in their boxes": share for what, share in shares.items()} | {"objects": len(classes)}
    return found | {"box IoU": float(np.mean(boxes)), "map IoU": float(np.mean(maps))}


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the intersection over union of two boxes: left, top, right, bottom."""
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    both = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


def read(judge: Any, images: "Tensor", labels: "Tensor") -> float:
    """Return the share of digits (n, 1, h, w) in [-1, 1] that the judge reads right."""
    from ldm.evaluation.networks import classify
    from ldm.images import to_uint8

    return (classify(judge, to_uint8(images)[:, 0]) == labels).float().mean().item()


def show(path: Path | None, rows: "Sequence[Tensor]", columns: int = 10) -> None:
    """Save the first of each row of images, one row below the other, enlarged."""
    if path is None:
        return
    from ldm.checkpoint.atomic import write_png
    from ldm.images import enlarge, image_grid, to_pil

    images = [image for row in rows for image in to_pil(row[:columns])]
    write_png(path, enlarge(image_grid(images, columns, factor=1), 2))


if __name__ == "__main__":
    run(main)
