"""CompVis's base class of data sets, and what its configurations name in its program `main`, without Lightning."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ldm.checkpoint.atomic import write_png
from ldm.images import image_grid, to_pil
from ldm.util import instantiate_from_config


class Txt2ImgIterableBaseDataset(IterableDataset):
    def __init__(self, num_records: int = 0, valid_ids: Any = None, size: int = 256) -> None:
        self.num_records, self.valid_ids, self.sample_ids, self.size = num_records, valid_ids, valid_ids, size

    def __len__(self) -> int:
        return self.num_records


class DataModuleFromConfig:
    """Data sets and loaders from configurations: `setup()`, then `train_dataloader()` and the other three."""

    def __init__(
        self, batch_size: int, train: Any = None, validation: Any = None, test: Any = None, predict: Any = None,
        wrap: bool = False, num_workers: int | None = None, shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False, shuffle_val_dataloader: bool = False,
    ) -> None:  # fmt: skip
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in given.items() if config is not None}
        self.batch_size, self.num_workers = batch_size, 2 * batch_size if num_workers is None else num_workers
        self.shuffled = {"train": True, "validation": shuffle_val_dataloader, "test": shuffle_test_loader}

    def setup(self, stage: str | None = None) -> None:
        self.datasets = {name: instantiate_from_config(config) for name, config in self.dataset_configs.items()}

    def _loader(self, name: str) -> DataLoader:
        data = self.datasets[name]
        shuffle = self.shuffled.get(name, False) and not isinstance(data, IterableDataset)
        return DataLoader(data, self.batch_size, shuffle, num_workers=self.num_workers)

    train_dataloader = partialmethod(_loader, "train")
    val_dataloader = partialmethod(_loader, "validation")
    test_dataloader = partialmethod(_loader, "test")
    predict_dataloader = partialmethod(_loader, "predict")


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
        step = batch_idx if self.log_on_batch_idx else pl_module.global_step
        due = step % self.batch_freq == 0 or step in self.log_steps
        if self.disabled or self.max_images < 1 or not due or (step == 0 and not self.log_first_step):
            return
        was_training, folder = pl_module.training, Path(self.save_dir, "images", split)
        pl_module.eval()
        with torch.no_grad():
            log = pl_module.log_images(batch, split=split, **self.log_images_kwargs)
        pl_module.train(was_training)
        at = f"gs-{pl_module.global_step:06}_e-{pl_module.current_epoch:06}_b-{batch_idx:06}"
        for name, images in log.items():
            write_png(folder / f"{name}_{at}.png", image_grid(to_pil(images[: self.max_images]), 4))
