"""Class conditioning: the published layout, and numbers that are no class."""

import re

import numpy as np
import pytest
import torch
from conftest import refused
from golden_fill import fill

from ldm.conditioning.classes import ClassEmbedder, ClassLabels, class_numbers


@torch.no_grad()
def test_each_class_has_its_vector():
    model = fill(ClassEmbedder(8, 11), 0)
    cond = model([3, 10, 3])
    assert list(cond) == ["c_crossattn"] and model.null == 10
    assert torch.equal(cond["c_crossattn"], model.embedding.weight[[3, 10, 3]][:, None])
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(model.encode(torch.tensor([3, 10, 3], dtype=dtype)), cond["c_crossattn"])
    assert torch.equal(model([model.null])["c_crossattn"][0, 0], model.embedding.weight[-1])


def test_numbers_may_be_texts_as_scripts_have_them():
    model = fill(ClassEmbedder(8, 11), 0)
    assert torch.equal(model.encode(["3", "", "10"]), model.encode([3, model.null, 10]))


def test_labels_are_handed_on_as_numbers():
    model = ClassLabels(11)
    cond = model(["3", "", 10, 0])
    assert list(cond) == ["c_adm"] and cond["c_adm"].tolist() == [3, 10, 10, 0] and model.null == 10


def test_without_a_null_class_there_is_no_empty_text():
    model = ClassLabels(10, null=False)
    assert model(["9", 0])["c_adm"].tolist() == [9, 0] and model.null is None
    refused("this model has no null class: name a class, 0 to 9", model, [""])


def test_labels_of_no_class_are_refused():
    assert ClassLabels(1, null=False)([0])["c_adm"].tolist() == [0] and ClassLabels(2).null == 1
    refused("n_classes 1 leaves no class besides the null class: count it too", ClassLabels, 1)
    refused("n_classes 0 leaves no class$", ClassLabels, 0, null=False)


def test_it_trains():
    model = ClassEmbedder(8, 11)
    model([3])["c_crossattn"].sum().backward()
    assert model.embedding.weight.grad[3].abs().min() > 0 and not model.embedding.weight.grad[4].any()


@pytest.mark.parametrize("wrong", [11, -1, "three", "-1", "٣", 2.0, True, None])
def test_what_is_no_class_is_refused_by_value(wrong):
    refused(f"class {wrong!r} does not exist: this model's are 0 to 10", ClassEmbedder(8, 11), [3, wrong])


def test_classes_may_be_numpys():
    assert class_numbers(np.arange(3), 11, 10).tolist() == class_numbers(["0", 1, np.int32(2)], 11, 10).tolist()


@pytest.mark.parametrize("wrong", [11, 1.0, [1, 2]])
def test_tensors_that_are_no_classes_are_refused(wrong):
    refused(re.escape(f"class {wrong} does not exist"), ClassEmbedder(8, 11), torch.tensor([wrong]))
