"""What DreamBooth did to a model of digits: the measures of Ruiz et al. 2022 (sections 4.2 and 4.4) and of forgetting.

Similarity is the cosine of the features of `networks`, where the paper takes DINO's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.captions import NUMBER_WORDS, SLANT_WORDS, WEIGHT_WORDS, Caption
from ldm.data.dreambooth import choices
from ldm.data.finding import find_images
from ldm.data.image_files import read_image
from ldm.data.measure import MNIST_THRESHOLDS
from ldm.evaluation.distances import kth_nearest, mean_pairwise_distance
from ldm.evaluation.networks import Measuring, classify, features_of
from ldm.evaluation.prompt import accuracy, style_accuracy
from ldm.evaluation.samples import from_pil, sample_images

COLUMNS = 9  # images in a row of the sheet


def read_folder(folder: Path) -> Tensor:
    """Read a folder's images as grey uint8 (n, 28, 28). FileNotFoundError for none, ValueError for another size."""
    return from_pil([read_image(path, channels=1) for path in find_images(folder)])


@dataclass(frozen=True)
class Detector:
    """Recognises a subject by the nearest neighbour, in features, among held-out images of it and other images.

    Attributes:
        subject, others: features (n, d) and (m, d).
    """

    subject: Tensor
    others: Tensor

    def recognised(self, features: Tensor) -> list[bool]:
        """Return whether each of (k, d) is nearer to some image of the subject than to any other."""
        return (_nearest(features, self.subject) < _nearest(features, self.others)).tolist()

    def errors(self) -> dict[str, Any]:
        """Return its error rates on the real images themselves, by leave-one-out."""
        missed = kth_nearest(self.subject, 1) >= _nearest(self.subject, self.others)
        false = _nearest(self.others, self.subject) < kth_nearest(self.others, 1)
        return {"missed": accuracy(missed.tolist()), "false_alarms": accuracy(false.tolist())}


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    """Return the distance (n,) from each of points (n, d) to the nearest of others (m, d)."""
    return torch.cdist(points, others).amin(dim=1)


def similarity(a: Tensor, b: Tensor | None = None) -> float:
    """Return the mean cosine of all pairs of a (n, d) with b (m, d); without b, of all pairs of different rows of a."""
    x, y = F.normalize(a.double()), F.normalize((a if b is None else b).double())
    total = (x @ y.T).sum().item()
    return (total - len(a)) / (len(a) * (len(a) - 1)) if b is None else total / (len(x) * len(y))


@dataclass(frozen=True)
class SubjectPrompts:
    """The subject's prompt, its class's (see `ldm.data.dreambooth.choices`), and which digit the class is, if any."""

    instance_prompt: str
    class_prompt: str
    digit: int | None


def styled(prompt: str) -> list[Caption]:
    """Return the prompt with each stroke weight ("a bold sks one") and each slant ("a sks one leaning left")."""
    article, _, rest = prompt.partition(" ")
    weights = [Caption(f"{article} {words[0]} {rest}", weight=i) for i, words in enumerate(WEIGHT_WORDS)]
    return weights + [Caption(f"{prompt} {words[0]}", slant=i) for i, words in enumerate(SLANT_WORDS)]


def measure_subject(
    model: Any, prompts: SubjectPrompts, detector: Detector, networks: Measuring, n: int, batch_size: int
) -> tuple[dict[str, Any], Tensor]:
    """Return all figures of one model from n images of each kind, sampled with its own settings, and some images.

    Args:
        detector: its `subject` are real images of the subject that were not trained on.

    Returns:
        The figures, and uint8 (3, columns, 28, 28): of the subject's prompt, of its class's, and of other digits.
    """

    def images(texts: Sequence[str], seed: int) -> Tensor:
        return sample_images(model, list(texts), seed, batch_size)

    classes, subject = choices(prompts.class_prompt), detector.subject
    results, own = images([prompts.instance_prompt] * n, 0), images([classes[i % len(classes)] for i in range(n)], 0)
    features, class_features = features_of(networks.features, results), features_of(networks.features, own)
    captions = [caption for caption in styled(prompts.instance_prompt) for _ in range(max(1, n // 6))]
    style = style_accuracy(images([c.text for c in captions], 2 * n), captions, MNIST_THRESHOLDS)
    digits = [i for i in range(10) if i != prompts.digit for _ in range(n // 9 + 1)]
    others = images([f"a handwritten digit {NUMBER_WORDS[digit]}" for digit in digits], 3 * n)
    right = (classify(networks.judge, others) == torch.tensor(digits)).tolist()
    real_to_real, fidelity = similarity(subject), similarity(features, subject)
    shown = torch.stack([some[:: max(1, len(some) // COLUMNS)][:COLUMNS] for some in (results, own, others)])
    figures = {
        "subject": {
            "similarity": fidelity,
            "real_to_real": real_to_real,
            "ratio": fidelity / real_to_real,
            "recognised": accuracy(detector.recognised(features)),
            "diversity": mean_pairwise_distance(features),
        },
        "prompt": {"class": _is_digit(results, prompts.digit, networks), "style": style["stated"]},
        "class": {
            "pres": similarity(class_features, subject),
            "div": mean_pairwise_distance(class_features),
            "leak": accuracy(detector.recognised(class_features)),
            "accuracy": _is_digit(own, prompts.digit, networks),
        },
        "other_digits": accuracy(right),
    }
    return figures, shown


def _is_digit(images: Tensor, digit: int | None, networks: Measuring) -> dict[str, Any] | None:
    """Return the share of images that the judge reads as that digit; None without a digit."""
    return None if digit is None else accuracy((classify(networks.judge, images) == digit).tolist())


def compare(before: dict[str, Any], after: dict[str, Any], without: dict[str, Any] | None) -> dict[str, Any]:
    """Return what was lost, and what prior preservation prevents if the same run without it was measured, too.

    pres_better_by is 1 - PRES with the prior / PRES without it: 0.26 in the paper (0.493 / 0.664, its table 4).
    """
    lost = before["other_digits"]["accuracy"] - after["other_digits"]["accuracy"]
    found = {"div_kept": after["class"]["div"] / before["class"]["div"], "other_digits_lost": lost}
    if without is not None:
        found |= {
            "other_digits_lost_without_prior": before["other_digits"]["accuracy"] - without["other_digits"]["accuracy"],
            "leak_without_prior": without["class"]["leak"]["accuracy"],
            "pres_better_by": 1 - after["class"]["pres"] / without["class"]["pres"],
        }
    return found
