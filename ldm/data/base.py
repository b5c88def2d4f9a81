"""A base of data sets of pictures with texts, which every copy of CompVis's training program imports."""

from typing import Any

from torch.utils.data import IterableDataset


class Txt2ImgIterableBaseDataset(IterableDataset):
    """A base for data sets of pictures with texts."""

    def __init__(self, num_records: int = 0, valid_ids: Any = None, size: int = 256) -> None:
        self.num_records, self.valid_ids, self.sample_ids, self.size = num_records, valid_ids, valid_ids, size

    def __len__(self) -> int:
        return self.num_records
