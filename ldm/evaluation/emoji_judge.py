"""The network that judges images of emoji. It trains here, on the real training images, and is kept in a file.

It recognises what a caption states (style, skin tone, gender, role, category), and compares images with captions, as
CLIP does; the Fréchet distance is in the features of that comparison. It shares nothing with a model that is measured,
and sees no held-out icon.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint.file import load_file
from ldm.checkpoint.writing import save_file
from ldm.data.emoji import Emoji, Icon
from ldm.data.emoji_captions import CATEGORIES, STYLES, TONES
from ldm.models.classifier import BasicBlock, conv_norm
from ldm.training.processes import mixed_precision

Classes = Mapping[str, Sequence[str]]  # attribute -> its values
CELLS = 4  # cells of a side that maps are pooled to
JUDGE_BATCH = 32
LEARNING_RATES = 5e-3, 1e-3  # at most: of the network, and of the linear maps of its thousands of features
WIDTH = 16
MOVES, SCALE = 4.0, 0.15  # random affine of the images that train: pixels, and share of the size, at most
UNTONED = "yellow"


class EmojiJudge(nn.Module):
    """Residual network on images (b, 3, h, w) in [-1, 1], with linear classifiers and an image-text model on its maps.

    A text is the sum of its words' vectors: words that are in one or two captions are learned in minutes, where a
    transformer needs hours. The maps are pooled on a grid: icons are centred, so that a hat is above and a hand beside.

    Args:
        classes: the values of each attribute.
        words: that it knows; others are left out.
        width: channels at half of the side, twice as many at each halving.
        dim: of the vectors of images and texts.
    """

    def __init__(self, classes: Classes, words: Sequence[str], width: int, dim: int = 128) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.stem = conv_norm(12, width)
        self.downs = nn.ModuleList(conv_norm(a, b) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(BasicBlock(b) for b in widths[1:])
        size = CELLS**2 * sum(widths)
        self.classes, self.head = classes, nn.Linear(size, sum(map(len, classes.values())))
        self.project, self.norm = nn.Linear(size, dim, bias=False), nn.BatchNorm1d(dim, affine=False)
        self.places, self.words = {w: i for i, w in enumerate(words)}, nn.EmbeddingBag(len(words), dim, mode="sum")
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the logits (b, values) of each attribute, and the vectors of the images.

        The vectors (b, dim) have unit variance in each dimension on training images; scaled to unit length, they
        compare with those of texts.
        """
        x = F.relu(self.stem(F.pixel_unshuffle(images, 2)))  # (b, width, h / 2, w / 2)
        maps = [F.adaptive_avg_pool2d(x, CELLS)]
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(F.relu(down(F.max_pool2d(x, 2))))
            maps.append(F.adaptive_avg_pool2d(x, CELLS))
        features = torch.cat(maps, dim=1).flatten(1)
        logits = self.head(features).float().split([*map(len, self.classes.values())], dim=1)
        return dict(zip(self.classes, logits, strict=True)), self.norm(self.project(features).float())

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Return unit vectors of texts, (b, dim)."""
        ids = [[self.places[word] for word in caption_words(caption) if word in self.places] for caption in captions]
        starts = torch.tensor([0, *map(len, ids)]).cumsum(0)[:-1]
        return F.normalize(self.words(torch.tensor([i for one in ids for i in one], dtype=torch.long), starts), dim=1)


def caption_words(text: str) -> list[str]:
    """Return the words of a text; medium-light is one."""
    return re.findall(r"[\w-]+", text.lower())


def attributes(icon: Icon) -> dict[str, str | None]:
    """Return the value of each attribute of an icon; None where it has none, or two."""
    toned = icon.parts.role is not None and len(icon.parts.tones) < 2
    return {
        "style": icon.style,
        "tone": (icon.tone or UNTONED) if toned else None,
        "gender": icon.parts.gender,
        "role": icon.parts.role,
        "category": icon.category,
    }


def classes_of(icons: Sequence[Icon]) -> dict[str, list[str]]:
    """Return the values of each attribute: those of style, tone and category, and what icons have of the others."""
    genders, roles = (sorted({v for i in icons if (v := attributes(i)[name])}) for name in ("gender", "role"))
    return {
        "style": [*STYLES.values()],
        "tone": [UNTONED, *TONES],
        "gender": genders or ["person"],
        "role": roles or ["adult"],
        "category": [*CATEGORIES],
    }


def facts_of(icons: Sequence[Icon], classes: Classes) -> dict[str, Tensor]:
    """Return the number of each icon's value of each attribute, int64 (n,); -1 where it has none that is known."""
    places = {name: {value: k for k, value in enumerate(values)} for name, values in classes.items()}
    found = [attributes(icon) for icon in icons]
    return {n: torch.tensor([known.get(one[n] or "", -1) for one in found]) for n, known in places.items()}


def load_judge(data: Emoji, folder: Path, epochs: int) -> EmojiJudge:
    """Return the judge, in eval mode: from a file of the folder, or trained now and written there.

    Args:
        data: training images, of which the name of the file follows, with the number of epochs.
    """
    words = sorted({word for text in data.texts() for word in caption_words(text)})
    params: dict[str, Any] = {"classes": classes_of(data.icons), "words": words, "width": WIDTH}
    identity = hashlib.sha256(repr((params, epochs, JUDGE_BATCH, LEARNING_RATES, MOVES, SCALE)).encode())
    identity.update(data.images.numpy().data)
    path = folder / f"judge-{identity.hexdigest()[:12]}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = EmojiJudge(**params)
        if path.is_file():
            judge.load_state_dict(load_file(path)[1])
        else:
            train_judge(judge, data, epochs)
            save_file(path, judge.state_dict(), {"params": params})
    return judge.eval().requires_grad_(False)


def train_judge(judge: EmojiJudge, data: Emoji, epochs: int) -> None:
    """Train on the images and captions of a data set, by AdamW with one cycle of the learning rates."""
    judge.to(memory_format=torch.channels_last).train()
    batch = min(JUDGE_BATCH, len(data))
    steps = epochs * (len(data) // batch)
    linear = [*judge.head.parameters(), *judge.project.parameters()]
    others = [p for p in judge.parameters() if not any(p is q for q in linear)]
    groups = [{"params": some, "lr": rate} for some, rate in zip((others, linear), LEARNING_RATES, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [*LEARNING_RATES], steps + 1, pct_start=0.15)
    facts = facts_of([data.icons[i] for i, _ in data.entries], judge.classes)
    fast = mixed_precision("auto", torch.device("cpu")) == "bf16"
    with tqdm(total=steps, desc="training the judge", unit="step", mininterval=1) as bar:
        for epoch in range(epochs):
            data.set_epoch(epoch)
            for chosen in torch.randperm(len(data))[: steps // epochs * batch].split(batch):
                with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                    loss = _loss(judge, augmented(data.images[chosen]), data, facts, chosen)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()


def _loss(judge: EmojiJudge, images: Tensor, data: Emoji, facts: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Return the cross-entropies of the attributes and CLIP's loss (Radford et al. 2021, figure 3), of one batch.

    Equal captions are positives of each other.
    """
    answers, vectors = judge(images)
    captions = [data.caption_of(i).text for i in chosen.tolist()]
    cosines = F.normalize(vectors, dim=1) @ judge.texts(captions).T.float()
    logits = judge.log_scale.exp().clamp(max=100) * cosines.float()
    true = torch.tensor([[float(a == b) for b in captions] for a in captions])
    true = true / true.sum(1, keepdim=True)  # symmetric
    total = (F.cross_entropy(logits, true) + F.cross_entropy(logits.T, true)) / 2
    for name, logits in answers.items():
        right = facts[name][chosen]
        if (right >= 0).any():
            total = total + F.cross_entropy(logits, right, ignore_index=-1, label_smoothing=0.05)
    return total


def augmented(images: Tensor) -> Tensor:
    """Return uint8 images (b, c, h, w) in [-1, 1], each moved and scaled at random; their borders are repeated."""
    b, side = len(images), images.shape[-1]
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + SCALE * (2 * torch.rand(b) - 1)
    theta[:, :, 2] = (2 * torch.rand(b, 2) - 1) * 2 * MOVES / side
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float() / 127.5 - 1, grid, padding_mode="border", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)
