"""CompVis's base class of data sets, and what its configurations call `main.DataModuleFromConfig`."""

from functools import partialmethod
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ldm.util import instantiate_from_config


class Txt2ImgIterableBaseDataset(IterableDataset):
    """The base class of data sets of images with texts."""

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
