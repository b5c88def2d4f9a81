"""The guided system's commands, from training to images, at as little of everything as possible."""

import numpy as np
import pytest
from script_runs import ROOT, load_script, pixels, recipe, samples

train, sample = load_script("train"), load_script("sample")
SHORT = ["loop.steps=2", "loop.batch_size=4", "loop.report_to=none", "data.params.first=8"]
FEW = {
    "guided": ["stage.params.model.params.defaults.steps=2", "stage.params.previews=1"],
    "noisy_classifier": ["stage.params.preview_columns=1"],
}


@pytest.fixture
def generate(mnist, tmp_path):
    """Train both networks, then `generate("--class", 5)` -> the single images' files."""
    for name, few in FEW.items():
        changes = [*SHORT, *few, f"data.params.root={mnist}", f"outdir={tmp_path / 'runs'}"]
        train.main([str(ROOT / "configs" / "pixel" / f"{name}.yaml"), *changes, "--device", "cpu"])
    model, classifier = (tmp_path / "runs" / name / "model.safetensors" for name in FEW)
    runs = []

    def run(*options, guided=True):
        runs.append(tmp_path / f"out{len(runs)}")
        guidance = ["--classifier", classifier] if guided else []
        argv = ["--ckpt", model, "--outdir", runs[-1], "--device", "cpu", *guidance, *options]
        sample.main([str(option) for option in argv])
        return samples(runs[-1])

    return run


def test_train_and_generate(generate):
    plain = generate("--n_samples", 4, guided=False)
    strong = ["--classifier-scale", 500]  # after two training steps the classifier's gradients are tiny
    guided = generate("--class", 3, 8, "--n_samples", 2, *strong)
    off = generate("--class", 3, 8, "--n_samples", 2, "--classifier-scale", 0)
    for a, b, c in zip(plain, guided, off, strict=True):
        assert np.array_equal(pixels(a), pixels(c)) and not np.array_equal(pixels(a), pixels(b))
    assert recipe(guided[0]).prompt in ("3", "8") and recipe(guided[0]).classifier_scale == 500
    assert len(recipe(guided[0]).classifier_hash) == 10 and recipe(plain[0]).classifier_hash == ""
    for sampler in ("ddim", "ddpm"):
        (again,) = generate("--from-png", generate("--class", 3, "--sampler", sampler)[0])
        (other,) = generate("--class", 3, "--sampler", sampler, "--classifier-scale", 500)
        assert recipe(again).sampler == sampler and not np.array_equal(pixels(again), pixels(other))

    with pytest.raises(ValueError, match="give --class"):
        generate()
    with pytest.raises(ValueError, match="class 'five' does not exist"):
        generate("--class", "five")
    (again,) = generate("--from-png", guided[0])
    assert np.array_equal(pixels(again), pixels(guided[0]))
    with pytest.raises(ValueError, match="for --classifier: give that file again"):
        generate("--from-png", guided[0], guided=False)
