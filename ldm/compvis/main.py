"""The callback of CompVis's program `main` that configurations name. It does not need Lightning."""

from pathlib import Path
from typing import Any

import torch

from ldm.images import image_grid, to_pil


class ImageLogger:
    """Saves the images of `model.log_images` below `save_dir`; call `log_img(model, batch, batch_idx)` every batch."""

    def __init__(
        self, batch_frequency: int, max_images: int, clamp: bool = True, increase_log_steps: bool = True,
        rescale: bool = True, disabled: bool = False, log_on_batch_idx: bool = False, log_first_step: bool = False,
        log_images_kwargs: dict | None = None, save_dir: str = ".",
    ) -> None:  # fmt: skip
        self.batch_freq, self.max_images, self.disabled, self.save_dir = batch_frequency, max_images, disabled, save_dir
        self.log_on_batch_idx, self.log_first_step = log_on_batch_idx, log_first_step
        self.log_steps = {2**n for n in range(batch_frequency.bit_length())} if increase_log_steps else set()
        self.log_images_kwargs = log_images_kwargs or {}

    def log_img(self, pl_module: Any, batch: Any, batch_idx: int, split: str = "train") -> None:
        """Write images/SPLIT/NAME_gs-STEP_e-EPOCH_b-BATCH.png, four in a row, at the steps to log."""
        step = batch_idx if self.log_on_batch_idx else pl_module.global_step
        due = step % self.batch_freq == 0 or step in self.log_steps
        if self.disabled or self.max_images < 1 or not due or (step == 0 and not self.log_first_step):
            return
        was_training, folder = pl_module.training, Path(self.save_dir, "images", split)
        pl_module.eval()
        with torch.no_grad():
            log = pl_module.log_images(batch, split=split, **self.log_images_kwargs)
        pl_module.train(was_training)
        folder.mkdir(parents=True, exist_ok=True)
        at = f"gs-{pl_module.global_step:06}_e-{pl_module.current_epoch:06}_b-{batch_idx:06}"
        for name, images in log.items():
            image_grid(to_pil(images[: self.max_images]), 4).save(folder / f"{name}_{at}.png")
