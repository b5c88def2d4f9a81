"""A strip of images that shows how one was sampled: the forward process, x_t, and the predicted x0."""

import math
from typing import TYPE_CHECKING

from PIL import Image

from ldm.arrays import Tensor
from ldm.diffusion.denoiser import to_vp
from ldm.diffusion.sampling import Step
from ldm.diffusion.sampling.first_order import add_noise
from ldm.images import to_pil
from ldm.labels import Row, labelled_rows

if TYPE_CHECKING:  # it imports torch
    from ldm.latent_diffusion import LatentDiffusion

STRIP_SIDE = 96  # pixels of an image's height, at least: its captions need the room


class StripRecorder:
    """A callback for `generate` that decodes `columns` of the denoising steps of each image, or all if there are fewer.

    They are spaced evenly; the last step is always among them.
    """

    def __init__(self, model: "LatentDiffusion", steps: int, columns: int = 10) -> None:
        self.model, self.last = model, steps - 1
        columns = min(columns, steps)
        self.kept = {round((i + 1) * steps / columns) - 1 for i in range(columns)}
        self.sigmas: list[float] = []  # after the kept steps of the current batch
        self.rows: list[tuple[list[Image.Image], ...]] = []  # of each image: the forward process, x_t, predicted x0

    def __call__(self, step: Step) -> None:
        if step.index == 0:  # a new batch
            self.sigmas = []
            self.rows += [([], [], []) for _ in step.x]
        if step.index not in self.kept:
            return
        self.sigmas.append(step.sigma)
        self._append(1, to_vp(step.x, step.sigma))  # unit variance, as the decoder expects
        self._append(2, step.x0)
        if step.index == self.last:
            self._add_forward_process(step.x)

    def strip(self, place: int, factor: int | None = None) -> Image.Image:
        """Return the strip of the image with this index among all images of the run.

        Its rows, from the top: the image noised to the kept noise levels, each from the one before; x_t after the kept
        steps; the x0 that was predicted in each. factor: they are enlarged by it (None: to STRIP_SIDE pixels).
        """
        forward, x_t, x0 = self.rows[place]
        levels = [f"sigma {sigma:.2g}" for sigma in self.sigmas]
        steps = [f"step {index + 1}" for index in sorted(self.kept)]
        after = [f"{step}\n{level}" for step, level in zip(steps, levels, strict=True)]
        rows = [
            Row("the image, with more and more noise (forward process)", forward, levels[::-1]),
            Row("x_t: the noisy image after a denoising step", x_t, after),
            Row("x0: the image without noise, as the step predicts it", x0, steps),
        ]
        return labelled_rows(rows, STRIP_SIDE, factor)

    def _add_forward_process(self, x: Tensor) -> None:
        """Noise the sampled x (b, ...) step by step (Ho et al. 2020, eq. 2), up through the kept noise levels."""
        noise = self.model.seeded_noise(range(len(self.rows) - len(x), len(self.rows)), tuple(x.shape[1:]))
        lower = self.sigmas[-1]
        for sigma in reversed(self.sigmas):
            x, lower = add_noise(x, math.sqrt(sigma**2 - lower**2), noise), sigma
            self._append(0, to_vp(x, sigma))

    def _append(self, row: int, latents: Tensor) -> None:
        images = to_pil(self.model.decode(latents))
        for rows, image in zip(self.rows[-len(images) :], images, strict=True):
            rows[row].append(image)
