"""How good a model of emoji is: does an image show what its caption states, is it sharp, and is it new?

Images are made for three groups of captions: of training icons (`seen`), of held-out ones (`held_out`: a role, gender,
skin tone and style that were never seen together), and of things that occur once or twice in training (`rare`). Each
figure stands beside what the real images of the same captions reach. All images are uint8 (n, 3, h, w), on white.
"""

import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.emoji import Emoji, Icon
from ldm.data.emoji_captions import EMOJI_FRAMES
from ldm.evaluation.distances import memorisation, nearest_training_distance, quantiles
from ldm.evaluation.emoji_judge import EmojiJudge, facts_of
from ldm.evaluation.frechet import frechet_distance, moments
from ldm.evaluation.own_data import report_reconstruction
from ldm.evaluation.prompt import accuracy
from ldm.evaluation.reference import measure_floor

CANDIDATES = 100  # captions that an image is compared with, its own among them
RARE = 2  # times, at most, that a rare thing occurs in training
EDGES = 0.05  # share of an image's pixels that count as its edges
FLAT = 1 / 255  # difference of neighbouring pixels, in [0, 1], below which an image is flat
REPEATS = 3  # processes that are timed


class Group(NamedTuple):
    """Icons, a caption of each that states everything, and their real images."""

    icons: list[Icon]
    captions: list[str]
    real: Tensor


def full_captions(icons: Sequence[Icon]) -> list[str]:
    """Return a caption of each icon, in a wording that follows from its name."""
    return [icon.caption(frame=random.Random(f"{icon.style} {icon.name}").choice(EMOJI_FRAMES)) for icon in icons]


def make_groups(training: Emoji, held_out: Emoji, n: int) -> dict[str, Group]:
    """Return the groups that images are made for, each of at most n icons, chosen at random with a fixed seed.

    training, held_out: with one white image for each icon.
    """
    counts = Counter(icon.parts.thing for icon in training.icons)
    rare = [i for i, icon in enumerate(training.icons) if counts[icon.parts.thing] <= RARE and icon.parts.role is None]
    groups = {"seen": (training, range(len(training.icons))), "held_out": (held_out, range(len(held_out.icons)))}
    if rare:
        groups["rare"] = training, rare
    found = {}
    for name, (data, places) in groups.items():
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:n].tolist()
        chosen = [places[k] for k in order]
        icons = [data.icons[i] for i in chosen]
        found[name] = Group(icons, full_captions(icons), data.images[chosen])
    return found


class Judged(NamedTuple):
    """What the judge says of n images: the number of the value of each attribute, int64 (n, attributes); vectors."""

    answers: Tensor
    vectors: Tensor  # float32 (n, d)


@torch.inference_mode()
def judged(judge: EmojiJudge, images: Tensor) -> Judged:
    """Let the judge, in eval mode, look at images."""
    found = [judge(batch.float() / 127.5 - 1) for batch in images.split(250)]
    answers = [torch.stack([logits.argmax(1) for logits in some.values()], dim=1) for some, _ in found]
    return Judged(torch.cat(answers), torch.cat([vectors for _, vectors in found]))


def report_attributes(judge: EmojiJudge, made: Judged, real: Judged, icons: Sequence[Icon]) -> dict[str, Any]:
    """Return how often the judge sees each attribute of the icons, in images made for them and in the real ones."""
    report = {}
    for k, (name, right) in enumerate(facts_of(icons, judge.classes).items()):
        own, beside = (accuracy((some.answers[:, k] == right)[right >= 0].tolist()) for some in (made, real))
        report[name] = {**own, "real": beside, "share_of_real": _ratio(own["accuracy"], beside["accuracy"])}
    return report


@torch.inference_mode()
def report_retrieval(
    judge: EmojiJudge, made: Judged, real: Judged, captions: Sequence[str], pool: Sequence[str]
) -> dict[str, Any]:
    """Return how often the right caption is the nearest of CANDIDATES to an image, or among the nearest five.

    pool: texts, of which the other candidates are chosen at random; the same for images made and for real ones.
    """
    distinct = sorted({*pool, *captions})
    texts = judge.texts(distinct)
    own = torch.tensor([distinct.index(caption) for caption in captions])
    scores = torch.rand(len(own), len(distinct), generator=torch.Generator().manual_seed(0))
    others = scores.scatter_(1, own[:, None], -1.0).topk(min(CANDIDATES, len(distinct)) - 1, dim=1).indices
    ranks = []
    for vectors in (F.normalize(some.vectors, dim=1) for some in (made, real)):
        right = (vectors * texts[own]).sum(1, keepdim=True)
        ranks.append(((vectors[:, None] * texts[others]).sum(2) >= right).sum(1))
    report: dict[str, Any] = {"candidates": others.shape[1] + 1, "n": len(own)}
    for k in (1, 5):
        share, beside = ((rank < k).double().mean().item() for rank in ranks)
        report[f"top_{k}"] = {"share": share, "real": beside, "share_of_real": _ratio(share, beside)}
    return report


def report_frechet(
    made: dict[str, Judged], held_out: Judged, training: Judged, icons: Sequence[Icon]
) -> dict[str, dict[str, float]]:
    """Return the Fréchet distance of images for seen and for held-out captions to real ones, beside what real ones get.

    `seen`: to half of the training images; the floor is that of as many images of the other half. `held_out`: to the
    real held-out images; the reference is the distance of as many training images of things that have skin tones.

    Args:
        icons: of the training images.
    """
    order = torch.randperm(len(icons), generator=torch.Generator().manual_seed(0))
    half, other = training.vectors[order].tensor_split(2)
    toned = training.vectors[torch.tensor([icon.parts.role is not None for icon in icons])]
    report = {}
    for name, to, pool, beside in (
        ("seen", half, other, "real_versus_real"),
        ("held_out", held_out.vectors, toned, "training_versus_held_out"),
    ):
        vectors = made[name].vectors
        distance = frechet_distance(*moments(vectors), *moments(to))
        floor = measure_floor(to, pool, min(len(vectors), len(to), len(pool))).frechet
        report[name] = {"distance": distance, beside: floor, "ratio": distance / floor, "n": len(vectors)}
    return report


def report_copies(made: Tensor, real: Tensor, training: Tensor) -> dict[str, float]:
    """Return how near images for held-out captions are to training images, beside the real held-out images.

    A held-out icon differs from some training icon in its tone only, so that the real ones are near, too. The last
    figure is the share of images that are nearer to a training image than to the icon of their caption.
    """
    nearest = nearest_training_distance(made, training)
    own = (made.float() - real.float()).flatten(1).norm(dim=1) / 255
    found = memorisation(nearest, *quantiles(nearest_training_distance(real, training)))._asdict()
    return {**found, "nearer_to_training_than_to_own": (nearest < own).double().mean().item()}


def edges(images: Tensor) -> Tensor:
    """Return how much each pixel differs from those on its right and below it, (n, h - 1, w - 1), per channel."""
    x = images.float() / 255
    across, down = x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]
    return (across.square() + down.square()).mean(1).sqrt()


def sharpness(images: Tensor) -> float:
    """Return the mean difference to their neighbours of the EDGES of pixels that differ most."""
    found = edges(images).flatten(1)
    return found.topk(max(1, int(EDGES * found.shape[1])), dim=1).values.mean().item()


def report_first_stage(autoencoder: Any, real: Tensor, batch_size: int) -> dict[str, Any]:
    """Return what a first stage loses of real images: decibels, sharpness of edges, and noise where they are flat."""
    report, made = report_reconstruction(autoencoder, real, batch_size)
    noise = edges(made)[edges(real) < FLAT].square().mean().sqrt().item()
    return {**report, "edge_sharpness": _ratio(sharpness(made), sharpness(real)), "noise_where_flat": noise}


def report_emoji(
    judge: EmojiJudge, made: dict[str, Tensor], groups: dict[str, Group], training: Emoji, held_out: Emoji
) -> dict[str, Any]:
    """Return all figures of images made for the captions of each group.

    training, held_out: with one white image for each icon.
    """
    pools = {data: full_captions(data.icons) for data in (training, held_out)}
    seen, report = {name: judged(judge, images) for name, images in made.items()}, {}
    for name, (icons, captions, images) in groups.items():
        real, pool = judged(judge, images), pools[held_out if name == "held_out" else training]
        report[name] = {
            "n": len(icons),
            "attributes": report_attributes(judge, seen[name], real, icons),
            "retrieval": report_retrieval(judge, seen[name], real, captions, pool),
            "edge_sharpness": _ratio(sharpness(made[name]), sharpness(images)),
        }
    report["held_out"]["memorisation"] = report_copies(made["held_out"], groups["held_out"].real, training.images)
    real = [judged(judge, images) for images in (groups["held_out"].real, training.images)]
    return {**report, "frechet": report_frechet(seen, *real, training.icons)}


def process_seconds(path: Path, prompt: str) -> dict[str, Any]:
    """Return the CPU seconds of processes: `txt2img` of one image at 20 steps, and `import torch`; medians of a few."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--ckpt", str(path), "--prompt", prompt, "--steps", "20", "--outdir", folder, "--device", "cpu"]
        commands = {"txt2img": ["-m", "ldm", "txt2img", *options], "import_torch": ["-c", "import torch"]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(REPEATS):
            for name, command in commands.items():
                before = os.times()
                subprocess.run([sys.executable, *command], check=True, capture_output=True)
                after = os.times()
                seconds[name].append(sum(after[2:4]) - sum(before[2:4]))  # of children: user and system
    found = {name: median(some) for name, some in seconds.items()}
    return {"seconds": {**found, "ratio": _ratio(found["txt2img"], found["import_torch"])}}


def _ratio(value: float | None, real: float | None) -> float | None:
    return value / real if value is not None and real else None
