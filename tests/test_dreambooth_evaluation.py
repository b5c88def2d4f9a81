"""The measures of DreamBooth: closed forms, the rule that finds the printed ones, and the comparison of models."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from ldm.commands import evaluate
from ldm.data.measure import SLANTS, STROKE_WEIGHTS
from ldm.evaluation.dreambooth import Detector, compare, read_folder, similarity, styled
from ldm.evaluation.subjects import FOOT, ORDINARY, foot, star, stars, write_images
from ldm.finetune.embedding_files import LearnedWord, write_words


def image_of(rows: list[str]) -> torch.Tensor:
    """An image of 28 x 28 from rows of marks."""
    image = torch.zeros(28, 28, dtype=torch.uint8)
    for y, row in enumerate(rows, start=4):
        for x, mark in enumerate(row, start=8):
            image[y, x] = 255 * (mark != " ")
    return image


def test_the_foot_of_ones():
    """A foot of 9 pixels under a stem of 2; a bare stem; a speck beside it; a bar in the middle; too low to tell."""
    stem, wide = "    ##", " #########"
    ones = [
        [stem] * 14 + [wide] * 2,
        [stem] * 16,
        [stem] * 15 + ["    ##   ###"],
        [stem] * 6 + [wide] * 2 + [stem] * 8,
        [stem] * 5 + [wide],
    ]
    assert foot(torch.stack([image_of(rows) for rows in ones])).tolist() == [7, 0, 1, 0, 0]
    assert foot(torch.zeros(1, 28, 28, dtype=torch.uint8)).tolist() == [0]
    assert ORDINARY < FOOT <= 7


def test_similarity_is_the_mean_cosine():
    a = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    root = 1 / math.sqrt(2)
    assert similarity(a) == pytest.approx((0 + root + root) / 3)
    assert similarity(a, torch.tensor([[5.0, 0.0]])) == pytest.approx((1 + 0 + root) / 3)
    assert similarity(a, a) == pytest.approx((3 + 2 * 2 * root) / 9)  # with each row's cosine to itself


def test_the_detector_and_its_errors():
    """On a line: the subject around 0, others around 10, one of each on the wrong side."""
    subject, others = torch.tensor([[0.0], [0.4], [0.8], [9.0]]), torch.tensor([[10.0], [10.9], [11.8], [0.55]])
    detector = Detector(subject, others)
    assert detector.recognised(torch.tensor([[-3.0], [0.1], [8.7], [9.6], [20.0], [0.56]])) == 3 * [True] + 3 * [False]
    errors = detector.errors()
    # 9.0 is nearer to 10 than to 0.8; 0.4 and 0.8 are nearer to 0.55 than to each other
    assert errors["missed"]["accuracy"] == 3 / 4
    # 10 is nearer to 10.9 (0.9) than to 9 (1); 0.55 is nearer to the subject
    assert errors["false_alarms"]["accuracy"] == 1 / 4


def test_prompts_that_state_a_style():
    captions = styled("a sks one")
    weights, slants = ("thin", "medium", "bold"), ("leaning left", "upright", "leaning right")
    assert [c.text for c in captions] == [f"a {w} sks one" for w in weights] + [f"a sks one {s}" for s in slants]
    assert [STROKE_WEIGHTS[c.weight] for c in captions[:3]] == list(STROKE_WEIGHTS)
    assert [SLANTS[c.slant] for c in captions[3:]] == list(SLANTS)


def figures(div, pres, digits, leak):
    return {"class": {"div": div, "pres": pres, "leak": {"accuracy": leak}}, "other_digits": {"accuracy": digits}}


def test_two_and_three_models_are_compared():
    before, after, without = figures(4.0, 0.3, 0.99, 0.0), figures(3.0, 0.493, 0.98, 0.01), figures(1, 0.664, 0.9, 0.9)
    two = compare(before, after, None)
    assert two == {"div_kept": 0.75, "other_digits_lost": pytest.approx(0.01)}
    three = compare(before, after, without)
    assert three == two | {
        "other_digits_lost_without_prior": pytest.approx(0.09),
        "leak_without_prior": 0.9,
        "pres_better_by": pytest.approx(0.2575, abs=1e-4),  # the paper's 26 %
    }


def test_stars_are_written_and_read(tmp_path):
    images = [np.asarray(star(seed)) for seed in range(6)]
    assert len({image.tobytes() for image in images}) == 6
    assert np.array_equal(images[3], np.asarray(star(3)))
    for image in images:
        assert image.shape == (28, 28) and image[14, 14] == 0 and 80 < (image > 102).sum() < 350
        assert image[[0, -1]].max() == 0 and image[:, [0, -1]].max() == 0  # entirely on the canvas
    parts = stars(torch.zeros(3, 28, 28, dtype=torch.uint8))
    write_images({"heldout": parts["heldout"][:4]}, tmp_path)
    with Image.open(tmp_path / "heldout" / "000.png") as image:
        assert image.size == (32, 32) and image.mode == "L"
    assert torch.equal(read_folder(tmp_path / "heldout"), parts["heldout"][:4])
    refused("is not a folder", read_folder, tmp_path / "others", error=FileNotFoundError)


def test_the_command(tiny_checkpoint, tmp_path):
    """The same model before, after and without the prior: nothing is lost, and all figures are there."""
    parts = stars(torch.zeros(1, 28, 28, dtype=torch.uint8))
    write_images({"heldout": parts["heldout"][:5]}, tmp_path / "star")
    models = [value for name in ("--ckpt", "--before", "--without") for value in (name, str(tiny_checkpoint))]
    prompts = ["--instance-prompt", "a sks star", "--class-prompt", "a five", "--digit", "5"]
    report, sheet = tmp_path / "report.json", tmp_path / "report.png"
    argv = ["dreambooth", *models, "--subject", str(tmp_path / "star"), *prompts, "--n", "10", "--device", "cpu"]
    evaluate.main([*argv, "--out", str(report)])
    found = json.loads(report.read_text())
    assert found["div_kept"] == 1 and found["other_digits_lost"] == 0 and found["pres_better_by"] == 0
    assert found["detector"]["missed"]["n"] == 5 and found["detector"]["false_alarms"]["n"] > 500
    assert found["before"] == found["after"] == found["without_prior"]
    assert found["after"]["subject"]["recognised"]["n"] == 10 and found["after"]["other_digits"]["n"] == 18
    words = LearnedWord("<star>", torch.ones(1, 32), 1)
    write_words(tmp_path / "star.safetensors", words, "diffusers")
    prompts[1] = "a <star>"
    evaluate.main([*argv, *prompts[:2], "--embedding", str(tmp_path / "star.safetensors"), "--out", str(report)])
    found = json.loads(report.read_text())
    assert found["before"]["class"] == found["after"]["class"]
    assert found["before"]["subject"] != found["after"]["subject"]
    with Image.open(sheet) as image:
        assert image.width > image.height
    for path in (tmp_path / "star" / "heldout").glob("00[1-4].png"):
        path.unlink()
    refused("heldout has one image: give at least 2", evaluate.main, argv)
