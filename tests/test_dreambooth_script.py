"""scripts/dreambooth.py as a user runs it: from images to a model that generates, LoRA, several subjects, mistakes."""

import json
import os
import signal
from inspect import signature

import pytest
import torch
from conftest import refused
from PIL import Image
from script_runs import load_script, recipe, samples

import ldm
from ldm.finetune import flags
from ldm.finetune.dreambooth import DreamBoothStage
from ldm.finetune.embeddings import add_word
from ldm.finetune.lora_files import load_lora, merge_lora
from ldm.inference import class_images
from ldm.inference.class_images import SubjectImages
from ldm.input_files import CONFIGS, read_yaml
from ldm.program import run
from ldm.training.loop_settings import LoopSettings
from ldm.util import get_obj_from_str

dreambooth, txt2img = load_script("dreambooth"), load_script("txt2img")
SHORT = ["--max_train_steps", "2", "--train_batch_size", "2", "--num_validation_images", "1", "--report_to", "none"]
SHORT += ["--mixed_precision", "fp32", "--device", "cpu"]


@pytest.fixture
def subject(tmp_path):
    """Four images as they come: grey, colour with an odd size, with transparency, turned; and another file."""
    folder = tmp_path / "subject"
    folder.mkdir()
    Image.new("L", (32, 32), 200).save(folder / "a.png")
    Image.new("RGB", (70, 41), (10, 200, 30)).save(folder / "b.jpg")
    Image.new("RGBA", (40, 40), (10, 200, 30, 100)).save(folder / "c.png")
    Image.new("I;16", (36, 30), 40000).save(folder / "d.png")
    (folder / "notes.txt.bak").write_text("x")
    return folder


def options(checkpoint, subject, out, *more):
    named = ["--instance_data_dir", subject, "--instance_prompt", "a sks five", "--class_prompt", "a five"]
    named += ["--num_class_images", "3"]
    return [str(option) for option in ["--ckpt", checkpoint, *named, "--output_dir", out, *SHORT, *more]]


def images_of(checkpoint, out) -> SubjectImages:
    """The data that a run was trained on."""
    model = ldm.load(checkpoint, device="cpu")
    return SubjectImages(model, 32, 1, **read_yaml(out / "config.yaml")["data"]["params"])


def test_from_images_to_a_model_that_generates(tiny_checkpoint, subject, tmp_path, capsys):
    out = tmp_path / "out"
    dreambooth.main(options(tiny_checkpoint, subject, out))
    said = capsys.readouterr()
    assert f"model: {out / 'model.safetensors'}" in said.out
    assert "skipped notes.txt.bak" in said.err and "'sks' into" in said.err
    assert len(list((out / "class").iterdir())) == 3 and (out / "contact_sheet.png").exists()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "instance_loss", "class_loss"} <= lines[-1].keys()
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["instance_loss"] + lines[-1]["class_loss"], rel=1e-5)
    result = out / "model.safetensors"
    assert result.stat().st_size <= tiny_checkpoint.stat().st_size
    images = tmp_path / "images"
    txt2img.main(["--ckpt", str(result), "--prompt", "a sks five", "--steps", "2", "--outdir", str(images)])
    assert len(samples(images)) >= 1
    refused("already holds a run", dreambooth.main, options(tiny_checkpoint, subject, out))


def test_prompts_are_left_alone(tiny_checkpoint, subject, tmp_path):
    """Prompts with `${...}`, which a yaml would replace by another value; what a yaml cannot hold is found early."""
    out = tmp_path / "out ${oc.env:HOME}"
    prompts = ["a ${sks} \\${name} five", "a ${sks"]

    def line(folder, *more):
        given = options(tiny_checkpoint, subject, folder, "--validation_prompt", prompts[1], *more)
        return [prompts[0] if word == "a sks five" else word for word in given]

    dreambooth.main(line(out))
    found = read_yaml(out / "config.yaml")
    assert found["data"]["params"]["instance_prompt"] == [prompts[0]] and found["name"] == out.name
    assert found["stage"]["params"]["previews"] == [prompts[1]]
    dreambooth.main(line(out, "--resume"))  # is finished, with the same settings
    dreambooth.main(line(tmp_path / "copy", "--resume", out))
    refused("not UTF-8", dreambooth.main, line(tmp_path / os.fsdecode(b"\xff")))
    assert not (tmp_path / os.fsdecode(b"\xff") / "class").exists()


@pytest.mark.smoke
def test_diffusers_names_and_resuming_a_finished_run(tiny_checkpoint, subject, tmp_path):
    """Accepted as they are; and a finished run asked to go on is left alone."""
    out, line = tmp_path / "out", options(tiny_checkpoint, subject, tmp_path / "out", "--with_prior_preservation")
    line[0] = "--pretrained_model_name_or_path"
    line += ["--center_crop", "--lr_warmup_steps", "1", "--snr_gamma", "5", "--offset_noise", "--train_text", "none"]
    line += ["--enable_bucket"]
    dreambooth.main(line)
    written = (out / "model.safetensors").stat().st_mtime_ns
    shapes = images_of(tiny_checkpoint, out).shapes
    assert shapes == [[(32, 32), (40, 24), (32, 32), (32, 32)]]
    before, after = ldm.load(tiny_checkpoint).state_dict(), ldm.load(out / "model.safetensors").state_dict()
    assert all((before[n] == after[n]).all() for n in before if n.startswith("cond_stage_model."))
    stage = read_yaml(out / "config.yaml")["stage"]["params"]
    assert stage["weight"] == {"name": "min_snr", "gamma": 5.0} and stage["noise"] == {"offset": 0.1}
    dreambooth.main([*line, "--resume_from_checkpoint", "latest"])
    assert (out / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.smoke
def test_lora_and_a_model_that_it_is_not_for(tiny_checkpoint, subject, tmp_path, capsys):
    out = tmp_path / "out"
    dreambooth.main(options(tiny_checkpoint, subject, out, "--rank", "2", "--lora_format", "peft"))
    assert f"lora: {out / 'lora.safetensors'} (" in capsys.readouterr().out
    assert 0 < (out / "lora.safetensors").stat().st_size < tiny_checkpoint.stat().st_size / 2
    assert (out / "model.safetensors").stat().st_size <= tiny_checkpoint.stat().st_size
    line = ["--lora", str(out / "lora.safetensors"), "--prompt", "a five", "--outdir", str(tmp_path / "images")]
    with pytest.raises(SystemExit) as ended:  # the model that ships
        run(lambda: txt2img.main(line))
    assert ended.value.code == 2 and "another architecture" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "images").rglob("*.png"))


@pytest.mark.parametrize(
    ("large", "option"), [(True, []), (False, ["--merge_lora", "no"]), (True, ["--merge_lora", "yes"])]
)
def test_a_merged_model_is_written_where_it_is_small_or_asked_for(
    tiny_checkpoint, subject, tmp_path, monkeypatch, capsys, large, option
):
    monkeypatch.setattr(flags, "SMALL", 0 if large else flags.SMALL)
    more = ["--rank", "2", "--lora_format", "peft", "--learning_rate", "1e-2", *option]
    dreambooth.main(options(tiny_checkpoint, subject, tmp_path / "out", *more))
    files, said = [tmp_path / "out" / f"{name}.safetensors" for name in ("model", "lora")], capsys.readouterr().out
    model = ldm.load(tiny_checkpoint, device="cpu")
    merge_lora(model, files[1])
    if "yes" in option:
        assert f"model: {files[0]} (" in said
        found = ldm.load(files[0], device="cpu").state_dict()
        assert all(torch.allclose(tensor, found[name], atol=1e-6) for name, tensor in model.state_dict().items())
        return
    assert f"use it: ldm txt2img --ckpt {tiny_checkpoint} --lora {files[1]} --prompt 'a sks five'" in said
    assert "model: " not in said and files[0].stat().st_size < tiny_checkpoint.stat().st_size / 2
    adapters = [load_lora(file, model)[0] for file in files]  # the same twice, in both formats
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(own.delta(), adapters[1][name].delta()) for name, own in adapters[0].items())
    refused("holds LoRA weights", ldm.load, files[0], device="cpu")


def test_a_model_with_learned_words(tiny_checkpoint, capsys):
    model = ldm.load(tiny_checkpoint, device="cpu")
    add_word(model, "<sks>", torch.zeros(1, 32))
    prompts = {"instance_prompt": "a <sks> five", "class_prompt": "a five", "learning_rate": 1e-3}
    DreamBoothStage(model, **prompts)
    assert "note: the result is without the learned words <sks>" in capsys.readouterr().err
    words = {"train_text": "words", "text_learning_rate": 1e-3}
    refused("<sks> has a learned word, which no model file can hold", DreamBoothStage, model, **prompts, **words)


def test_damage_bad_captions_and_bad_settings_show_before_the_class_is_drawn(
    tiny_checkpoint, subject, tmp_path, monkeypatch, capsys
):
    def stop(*arguments):
        raise ValueError("stopped")

    whole = (subject / "b.jpg").read_bytes()
    (subject / "b.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(ValueError, match=r"b\.jpg cannot be read as an image: .*(?i:truncated)"):
        dreambooth.main(options(tiny_checkpoint, subject, tmp_path / "out"))
    (subject / "b.jpg").write_bytes(whole)
    for name, text in (("a.txt", ""), ("b.txt", "a sks five in snow")):
        (subject / name).write_text(text)
    capsys.readouterr()
    (subject / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    refused(r"there is no image 'gone\.png'", dreambooth.main, options(tiny_checkpoint, subject, tmp_path / "out"))
    (subject / "metadata.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(class_images, "generate_class_images", stop)
        refused("stopped", dreambooth.main, options(tiny_checkpoint, subject, tmp_path / "out"))
    assert capsys.readouterr().err.count("captions are empty") == 1
    bad = {"ema 1.5 must be": ["--use_ema", "--ema_decay", "1.5"]}
    bad |= {"cannot hold the vectors of words": ["--rank", "2", "--train_text", "words"]}
    for message, more in bad.items():
        refused(message, dreambooth.main, options(tiny_checkpoint, subject, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_class_images_are_generated(tiny_checkpoint, subject, tmp_path, monkeypatch, capsys, number):
    """What was generated stays; nothing else does; the same command goes on, with --resume or without."""
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)  # shells let what runs in the background ignore it
    out, save, before = tmp_path / "out", class_images.save_image, signal.getsignal(number)
    saved: list = []

    def stop(image, path, text):
        if len(saved) == 2:
            os.kill(os.getpid(), number)
        save(image, path, text)
        saved.append((path, path.stat().st_mtime_ns))

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(class_images, "save_image", stop)
        run(lambda: dreambooth.main(options(tiny_checkpoint, subject, out)))
    assert ended.value.code == 130 and capsys.readouterr().err.endswith("interrupted: what was finished is saved\n")
    assert signal.getsignal(number) is before and len(saved) == 2
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(path for path, _ in saved)
    dreambooth.main(options(tiny_checkpoint, subject, out, *["--resume"] * (number == signal.SIGTERM)))
    assert [path.stat().st_mtime_ns for path, _ in saved] == [time for _, time in saved]
    assert len(list((out / "class").iterdir())) == 3 and (out / "model.safetensors").exists()


def test_fewer_class_images_than_asked(tiny_checkpoint, subject, tmp_path, capsys):
    """The model generates the missing ones; the user's come first, and stay as they were."""
    own = tmp_path / "own"
    own.mkdir()
    Image.new("L", (32, 32), 99).save(own / "a.png")
    before = (own / "a.png").read_bytes()
    dreambooth.main(options(tiny_checkpoint, subject, tmp_path / "out", "--class_data_dir", own))
    assert f"class images in {own}: 1; the model generates 2 more" in capsys.readouterr().out
    (kept,) = images_of(tiny_checkpoint, tmp_path / "out").classes
    assert kept.paths[0] == str(own / "a.png") and len(kept) == 3 == len(list(own.iterdir()))
    assert (own / "a.png").read_bytes() == before


def test_several_subjects_and_own_class_images(tiny_checkpoint, subject, tmp_path):
    second, own = tmp_path / "second", tmp_path / "own"
    for folder, count in ((second, 2), (own, 4)):
        folder.mkdir()
        for i in range(count):
            Image.new("L", (32, 32), 50 * i + count).save(folder / f"{i}.png")
    more = ["--instance_data_dir", second, "--instance_prompt", "a zwx six", "--class_prompt", "a six"]
    dreambooth.main(options(tiny_checkpoint, subject, tmp_path / "out", *more, *["--class_data_dir", own] * 2))
    assert not (tmp_path / "out" / "class").exists() and len(list(own.iterdir())) == 4
    with pytest.raises(ValueError, match="2 --instance_data_dir need as many --class_data_dir, got 1"):
        dreambooth.main(options(tiny_checkpoint, subject, tmp_path / "no", *more, "--class_data_dir", own))


def test_a_single_image_is_enough_but_said(tiny_checkpoint, subject, tmp_path, capsys):
    for name in ("b.jpg", "c.png", "d.png"):
        (subject / name).unlink()
    line = options(tiny_checkpoint, subject, tmp_path / "out")
    at = line.index("--class_prompt")
    dreambooth.main(line[:at] + line[at + 4 :])  # without a class, any word may be the identifier
    said = capsys.readouterr().err
    assert "holds a single image: three to five" in said and "'sks' into" in said
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_class_of_several_prompts_and_what_is_kept_beside_it(tiny_checkpoint, subject, tmp_path):
    """Two prompts share three images, and three more are of what else is to be kept; all are in the loss."""
    line = options(tiny_checkpoint, subject, tmp_path / "out", "--keep_prompt", "a {seven|eight}")
    line[line.index("--class_prompt") + 1] = "a {five|six}"
    dreambooth.main(line)
    (kept,) = images_of(tiny_checkpoint, tmp_path / "out").classes
    assert kept.texts() == ["a five"] * 2 + ["a six"] + ["a seven"] * 2 + ["a eight"]
    assert dict(zip(kept.paths, kept.texts(), strict=True)) == {
        str(path): recipe(path).prompt for path in (tmp_path / "out" / "class").iterdir()
    }


@pytest.mark.parametrize("size", ["", "_large"])
def test_train_gives_what_the_script_gives(tiny_checkpoint, subject, tmp_path, monkeypatch, size):
    """The same bytes from the yaml and `key=value`, by whichever file suits the model's size."""
    monkeypatch.setattr(flags, "SMALL", 0 if size else flags.SMALL)
    dreambooth.main(options(tiny_checkpoint, subject, tmp_path / "script", "--class_guidance_scale", "1"))
    params = {"data.params.instance_data_dir": subject, "data.params.instance_prompt": "a sks five"}
    params |= {"data.params.class_prompt": "a five", "data.params.num_class_images": 3, "name": "train"}
    params |= {"stage.params.ckpt": tiny_checkpoint, "stage.params.preview_columns": 1, "outdir": tmp_path}
    params |= {"loop.steps": 2, "loop.batch_size": 2, "loop.precision": "fp32", "loop.report_to": "none"}
    params |= {"data.params.class_guidance_scale": 1}
    settings = [f"{key}={value}" for key, value in params.items()]
    yaml = CONFIGS / "finetune" / f"dreambooth{size}.yaml"
    load_script("train").main([str(yaml), *settings, "--device", "cpu"])
    results = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("train", "script")]
    assert results[0] == results[1]
    with pytest.raises(ValueError, match="give the folder that holds the subject's images"):
        load_script("train").main([str(yaml), f"outdir={tmp_path / 'no'}", f"stage.params.ckpt={tiny_checkpoint}"])


@pytest.mark.parametrize("script", ["dreambooth", "textual_inversion"])
def test_every_flag_sets_a_key_that_exists(script):
    """Of the loop, the stage and the data set that both of its configurations name."""
    rows = [row for table in load_script(script).FLAGS.values() for row in table]
    for size in ("", "_large"):
        config = read_yaml(CONFIGS / "finetune" / f"{script}{size}.yaml")
        known = {f"loop.{name}" for name in LoopSettings.__dataclass_fields__}
        for part in ("stage", "data"):
            takes = signature(get_obj_from_str(config[part]["target"])).parameters
            assert config[part]["params"].keys() <= takes.keys()
            known |= {f"{part}.params.{name}" for name in takes}
        keys = {key for _, key, _, _ in rows if key.startswith(("loop.", "stage.", "data."))}
        nested = {
            "loop.lr_schedule.warmup",
            "stage.params.noise.offset",
            "stage.params.betas.0",
            "stage.params.betas.1",
        }
        nested |= {f"stage.params.lora.{name}" for name in ("rank", "alpha", "targets")}
        assert keys <= known | nested and len(keys) > 15


def test_every_mistake_is_one_sentence(tiny_checkpoint, subject, tmp_path, capsys):
    def line(*changes):
        return options(tiny_checkpoint, subject, tmp_path / "no", *changes)

    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "z.png").write_bytes((subject / "a.png").read_bytes())
    (tmp_path / "link").symlink_to(subject)
    (tmp_path / "bad" / "x.png").write_bytes((subject / "a.png").read_bytes()[:50])
    plain = ["--output_dir", str(tmp_path / "no"), "--ckpt", str(tiny_checkpoint), *SHORT]
    only = [*plain, "--instance_prompt", "a sks five"]
    own = ["--instance_data_dir", str(subject)]
    of_class = {"--num_class_images": "3", "--prior_loss_weight": "0.5", "--class_guidance_scale": "2"}
    of_class |= {"--sample_batch_size": "2", "--keep_prompt": "a six", "--class_data_dir": str(tmp_path / "copies")}
    mistakes = {
        "give the folder": plain,
        "need as many --instance_prompt, got 0": [*plain, "--instance_data_dir", str(subject)],
        "empty holds no images": [*only, "--instance_data_dir", str(tmp_path / "empty")],
        "none is not a folder": [*only, "--instance_data_dir", str(tmp_path / "none")],
        "x.png ": [*only, "--instance_data_dir", str(tmp_path / "bad")],
        "needs --class_prompt": [*only, *own, "--with_prior_preservation"],
        **{f"{flag} would have": [*only, *own, flag, value] for flag, value in of_class.items()},
        f"{subject} would hold": line("--class_data_dir", str(tmp_path / "link")),
        "z.png of its class has the same bytes": line("--class_data_dir", str(tmp_path / "copies")),
        "--instance_prompt ' ' is empty": [*plain, *own, "--instance_prompt", " "],
        "--num_class_images would have no effect: --prior_loss_weight 0": line("--prior_loss_weight", "0"),
        "--lora_alpha, --lora_format would have": line("--lora_alpha", "2", "--lora_format", "peft"),
        "betas [1.0, 0.999] must be a list of 2 entries, each a number from 0": line("--adam_beta1", "1"),
        "learning_rate 0.0 must be a number above 0": line("--learning_rate", "0"),
        "loop.batch_size 1000000 times": line("--train_batch_size", "1000000"),
        "'a {six|seven' has a choice with a brace too few": line("--keep_prompt", "a {six|seven"),
        "--adam_beta1 would have": line("--adam_beta1", "0.8", "--optimizer", "adafactor"),
        "by lora.targets": line("--rank", "2", "--train_layers", "attention"),
        "keep them apart": line("--output_dir", str(subject / "out")),
        f"{subject} lies in {tmp_path}": line("--class_data_dir", str(tmp_path)),
        "cannot be made by this model": line("--resolution", "33"),
        "the square is the only bucket": line("--resolution", "8", "--buckets"),
        "match no weight": line("--train_layers", "attn9"),
        "bitsandbytes, which is not installed": line("--use_8bit_adam"),
        "adafactor's learning rate is relative": line("--optimizer", "adafactor"),
        "did you mean --learning_rate?": line("--learning_rat", "1"),
        "name 'model.safetensors' is that of a file": line("--output_dir", str(tmp_path / "model.safetensors")),
        "--instance_data_dir: the path is empty": line("--instance_data_dir", ""),
        "holds no run to resume": line("--resume_from_checkpoint", str(tmp_path / "none")),
    }
    for message, argv in mistakes.items():
        with pytest.raises(SystemExit) as ended:
            run(lambda argv=argv: dreambooth.main(argv))
        said = capsys.readouterr().err
        last = [text for text in said.splitlines() if text.startswith("error: ")]
        assert ended.value.code == 2 and len(last) == 1 and message in last[0], f"{message}: {said}"
    assert not list((tmp_path / "no").rglob("*.png")) and not (tmp_path / "no" / "model.safetensors").exists()
