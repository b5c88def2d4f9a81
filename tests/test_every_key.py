"""Nothing that a configuration asks for is ignored: every key changes what training makes, or is refused.

What training makes: its files, what it prints, the order in which files are written, the convolutions and matrix
products that it computes (so that keys of speed and memory show), and how it loads its data.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from test_reference_pages import DATA, PARTS, STAGES, parameters
from tiny_stages import config_of, write_inputs, write_rows

from ldm.commands.train import main
from ldm.training import metrics
from ldm.training.datasets import DataSettings
from ldm.training.loop_settings import LoopSettings

UNET = "stage.params.unet_config.params"
# Where it stands (a stage of tiny_stages, and a place in its configuration): what is changed there, one at a time.
# `{to: a, with: b}` is a value and what else has to be set for it to matter, which the run that it is compared with has
# too; `/` begins a key of the whole configuration.
TABLE = """
pixel loop:
  {steps: 3, batch_size: 3, accumulate: 2, precision: {to: bf16, with: {precision: fp32}}, clip: 0.001,
   gradient_checkpointing: true, ema: 0.0, ema_device: disk, ema_snapshots: 2, compile: true,
   lr_schedule: {name: linear},
   log_every: {to: 2, with: {preview_every: 2, save_every: 2}}, preview_every: 2, save_every: 2, keep_every: 1,
   keep_state: false, workers: 1, report_to: tensorboard,
   quality: {target: ldm.evaluation.quality.Quality, params: {images: 2}},
   quality_every: {to: 1, with: {preview_every: 2, quality: {target: ldm.evaluation.quality.Quality}}},
   validate_every: {to: 1, with: {preview_every: 2, /data.validation: 0.25}},
   validate_both: {to: true, with: {/data.validation: 0.25}}}
pixel loop.quality.params:
  {images: {to: 2, with: {/loop.quality.target: ldm.evaluation.quality.Quality, images: 4}},
   classifier: {to: judge, with: {/loop.quality.target: ldm.evaluation.quality.Quality}},
   features: {to: missing, with: {/loop.quality.target: ldm.evaluation.quality.Quality}},
   batch_size: {to: 3, with: {/loop.quality.target: ldm.evaluation.quality.Quality}}}
pixel data: {target: missing, params: {}, validation: 0.25}
autoencoder stage.params:
  {ddconfig: {}, embed_dim: 3, learning_rate: 0.002, kl_weight: 1.0, reconstruction: l1, discriminator: null,
   disc_start: 9, disc_weight: 2.0, edge_weight: 1.0, perceptual: judge,
   perceptual_weight: {to: 2.0, with: {perceptual: judge}}, normalize: false,
   optimizer: {target: torch.optim.SGD}, preview_columns: 2, n_embed: 8,
   codebook_weight: {to: 3.0, with: {n_embed: 8, ddconfig: {double_z: false}}}}
decoder stage.params:
  {first_stage: missing, learning_rate: 0.002, reconstruction: l1, discriminator: null, disc_start: 9, disc_weight: 2.0,
   edge_weight: 1.0, perceptual: judge, perceptual_weight: {to: 2.0, with: {perceptual: judge}},
   optimizer: {target: torch.optim.SGD}, preview_columns: 2}
clip stage.params:
  {vision: {image_size: 16}, learning_rate: 0.002, width: 32, layers: 2, heads: 4, context_length: 30,
   projection_dim: 8, merges_first: 200, agreement: {to: 1.0, with: {/loop.batch_size: 16}}, weight_decay: 0.5,
   pooled: false, image_encoder: image_encoder.safetensors, optimizer: adafactor, preview_columns: 2}
diffusion stage.params:
  {unet_config: {}, first_stage: missing, cond_stage: missing, learning_rate: 0.002, schedule: {name: linear},
   prediction: eps, defaults: {height: 16, width: 16, steps: 4, scale: 2.0}, betas: [0.5, 0.9], weight_decay: 0.5,
   optimizer: adafactor,
   error: l1, weight: {name: min_snr}, noise: {offset: 0.1}, timesteps: {name: logit_normal}, caption_dropout: 1.0,
   pooled: false, start: missing, train_text: true, cache_latents: false, cache_dir: cache, posterior: mean,
   preview_prompts: [four],
   concat: latents_mask,
   preview_columns: {to: 1, with: {preview_prompts: [four, five]}}}
pixel stage.params:
  {model: {}, learning_rate: 0.002, class_dropout: 1.0, error: l1, weight: {name: min_snr}, noise: {offset: 0.1},
   timesteps: {name: logit_normal},
   bound_weight: {to: 1.0, with: {model.params.learned_variance: true,
                                  model.params.unet_config.params.out_channels: 2}},
   betas: [0.5, 0.9], weight_decay: 0.5, optimizer: {target: torch.optim.SGD}, previews: 3, preview_columns: 1}
classifier stage.params:
  {network: {}, learning_rate: 0.002, weight_decay: 0.5, label_smoothing: 0.5, rotation: 40.0, shear: 0.5,
   scale: 0.5, shift: 8.0, optimizer: adafactor, preview_columns: 2}
dreambooth stage.params:
  {ckpt: missing, learning_rate: 0.002, resolution: 64, instance_prompt: a sks four, class_prompt: four,
   train_text: all, text_learning_rate: {to: 0.1, with: {train_text: all, text_learning_rate: 0.001}},
   layers: attention, lora: {rank: 2}, lora_file: {to: lora.safetensors, with: {lora: {rank: 2}}},
   lora_format: {to: peft, with: {lora: {rank: 2}, lora_file: lora.safetensors}}, prior_weight: 3.0, error: l1,
   weight: {name: min_snr}, noise: {offset: 0.1}, timesteps: {name: logit_normal}, optimizer: adafactor,
   betas: [0.5, 0.9], weight_decay: 0.5, cache: false, previews: [four],
   preview_columns: 2, sheet: sheet.png, loading: {prediction: eps}, seed: {to: 1, with: {lora: {rank: 2}}},
   merge: {to: false, with: {lora: {rank: 2}, lora_file: lora.safetensors}}}
textual_inversion stage.params:
  {word: <its>, initial: four, resolution: 64, learning_rate: 0.002, ckpt: missing, loading: {prediction: eps},
   vectors: 3, relative_learning_rate: {to: 0.5, with: {learning_rate: null, relative_learning_rate: 0.1}},
   frames: ['my {}'], pull: 1.0, error: l1, weight: {name: min_snr}, noise: {offset: 0.1},
   timesteps: {name: logit_normal}, optimizer: {target: torch.optim.SGD}, previews: 2, sheet: sheet.png}
distillation stage.params:
  {ckpt: missing, learning_rate: 0.002, steps: 8, consistency: null, scale: 3.0, interval: [1.0, 2.0],
   caption_dropout: 1.0, betas: [0.5, 0.9], weight_decay: 0.5, optimizer: adafactor, cache_latents: false,
   cache_dir: cache, posterior: mean, preview_prompts: [four],
   preview_columns: {to: 1, with: {preview_prompts: [four, five]}},
   loading: {prediction: eps}}
distillation stage.params.consistency:
  {stage_batches: 2, mean: 0.0, std: 1.0, q: 2.0, k: 1.0, b: 0.1}
noisy_classifier stage.params:
  {network: {}, learning_rate: 0.002, schedule: {name: linear}, timesteps: {name: logit_normal}, betas: [0.5, 0.9],
   weight_decay: 0.5, optimizer: adafactor, preview_columns: 2}
ddgan stage.params:
  {model: {}, discriminator: {}, learning_rate: 0.002, discriminator_rate: 0.002, class_dropout: 1.0,
   betas: [0.1, 0.5], r1_weight: 5.0, r1_every: 1, reconstruction: 1.0, optimizer: adafactor, previews: 4,
   preview_columns: 1}
clip data.params: {split: test, first: 3, last: 3, seed: 1, frames: test, styled: 1.0, filler: 1.0}
folder data.params:
  {root: class, size: 16, channels: 3, crop: random, flip: true, seed: {to: 1, with: {flip: true, crop: random}},
   caption: four, paths: [instance/0.png], buckets: [[32, 24]], reads: [image],
   shuffle_tags_after: {to: 0, with: {caption: 'four, five, six'}}, alpha: keep, resize: exact,
   mask: {to: alpha, with: {root: faulty, on_error: skip}},
   background: {to: black, with: {root: faulty, on_error: skip}},
   on_error: {to: refuse, with: {root: faulty, on_error: skip}}, cache_dir: known}
rows data.params:
  {root: faulty_rows, size: 16, channels: 3, crop: random, flip: true,
   seed: {to: 1, with: {flip: true, crop: random}}, caption: {to: four, with: {text: none}}, split: test, subset: one,
   download: true, image: other, text: none, buckets: [[32, 24]], reads: [image],
   label: {to: other, with: {/stage: {target: ldm.training.classifier.ClassifierStage, params: {learning_rate: 0.1,
     network: {target: ldm.models.classifier.Judge, params: {widths: [4, 4, 8]}}}}, label: text}},
   shuffle_tags_after: {to: 0, with: {text: none, caption: 'four, five, six'}}, alpha: keep, resize: exact,
   background: {to: black, with: {root: faulty_rows, on_error: skip}},
   mask: {to: alpha, with: {root: faulty_rows, on_error: skip}},
   on_error: {to: refuse, with: {root: faulty_rows, on_error: skip}}, cache_dir: known}
shards data.params:
  {root: '[01].tar', size: 16, channels: 3, crop: random, flip: true,
   seed: {to: 1, with: {flip: true, crop: random}}, caption: four, buckets: [[32, 24]], reads: [image],
   shuffle_tags_after: {to: 0, with: {caption: 'four, five, six'}}, mixed: 2, alpha: keep, resize: exact,
   background: {to: black, with: {root: faulty.tar, on_error: skip}},
   mask: {to: alpha, with: {root: faulty.tar, on_error: skip}},
   on_error: {to: refuse, with: {root: faulty.tar, on_error: skip}}, cache_dir: known}
dreambooth data.params:
  {instance_data_dir: class, instance_prompt: a sks four, class_data_dir: elsewhere, class_prompt: four,
   keep_prompt: four, prior_weight: 0.0, num_class_images: 6,
   default_class_images: {to: 6, with: {class_data_dir: elsewhere, default_class_images: 5}},
   class_guidance_scale: {to: 3.0, with: {class_data_dir: elsewhere, default_class_images: 5}},
   sample_batch_size: {to: 1, with: {class_data_dir: elsewhere, default_class_images: 5}}, crop: random, flip: true,
   seed: {to: 1, with: {crop: random}}, min_samples: 50, buckets: true, mask: file}
pixel stage.params.weight: {name: {to: snr, with: {name: min_snr}}, gamma: {to: 1.0, with: {name: min_snr}}}
pixel stage.params.noise: {offset: 0.1, immiscible: true}
pixel stage.params.timesteps:
  {name: {to: logit_normal, with: {name: uniform}}, mean: {to: 2.0, with: {name: logit_normal}},
   std: {to: 3.0, with: {name: logit_normal}}}
pixel stage.params.model.params.schedule: {name: cosine, T: 500, start: 0.001, end: 0.1, zero_terminal_snr: true,
                                             shift: 2.0}
pixel loop.lr_schedule:
  {name: {to: linear, with: {name: constant}}, warmup: {to: 2, with: {name: constant}},
   decay: {to: 0.1, with: {name: linear}}, low: {to: 0.5, with: {name: step}}}
dreambooth stage.params.lora:
  {rank: {to: 3, with: {rank: 2}}, alpha: {to: 1.0, with: {rank: 2}},
   targets: {to: [attention], with: {rank: 2, targets: [feed_forward]}}, seed: {to: 1, with: {rank: 2}}}
pixel stage.params.model.params:
  {unet_config: {}, channels: 3, cond_stage_config: null, schedule: {name: cosine}, prediction: v,
   defaults: {height: 16, width: 16, steps: 4, scale: 1.0}, clip: false, learned_variance: true,
   self_condition: true}
autoencoder stage.params.discriminator: {input_nc: 3, ndf: 8, n_layers: 2}
autoencoder stage.params.ddconfig:
  {ch: 16, out_ch: 3, num_res_blocks: 2, attn_resolutions: [16], in_channels: 3, resolution: 64, z_channels: 8,
   ch_mult: [1, 2], dropout: 0.5, resamp_with_conv: false, double_z: false, attn_type: none, tanh_out: true,
   norm_groups: 8,
   use_linear_attn: {to: true, with: {attn_resolutions: [16]}}, give_pre_end: true, patch: 2}
diffusion stage.params.unet_config.params:
  {in_channels: 5, model_channels: 32, out_channels: 8, num_res_blocks: 2, attention_resolutions: [1], dropout: 0.5,
   channel_mult: [1, 1], conv_resample: false, dims: 1, num_classes: 11, use_checkpoint: true, num_heads: 2,
   num_head_channels: 8, num_heads_upsample: 2, use_scale_shift_norm: true, resblock_updown: true,
   use_new_attention_order: true, use_spatial_transformer: false, transformer_depth: 2, context_dim: 16, n_embed: 8,
   legacy: true, disable_self_attentions: [true, true], num_attention_blocks: [0, 0], disable_middle_self_attn: true,
   use_linear_in_transformer: true, adm_in_channels: 12, norm_groups: 4, patch: 2, attention_type: linear,
   attention_memory: 4, coordinates: true}
"""
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    tuple(where.split()): keys for where, keys in yaml.safe_load(TABLE).items()
}
# Keys that their own page calls without effect: CompVis's configurations have them.
INERT = {"UNetModel": ("image_size", "use_fp16", "use_bf16")}
# Which class or function has the keys of a place; others are those of the configuration's own stage or data set.
OF = {
    "loop": LoopSettings,
    "data": DataSettings,
    "loop.lr_schedule": "lr_multiplier",
    "loop.quality.params": "Quality",
    "stage.params.weight": "loss_weight",
    "stage.params.noise": "training_noise",
    "stage.params.timesteps": "training_timesteps",
    "stage.params.model.params.schedule": "make_schedule",
    "stage.params.model.params": "PixelDiffusion",
    "stage.params.lora": "attach",
    "stage.params.consistency": "Consistency",
    "stage.params.discriminator": "NLayerDiscriminator",
    "stage.params.ddconfig": "Encoder",
    UNET: "UNetModel",
}
# MNIST's keys are those of Digits and where its files are; those of Emoji and Scenes are in tests of their own; the
# others' are a part of the classes above.
ELSEWHERE = {"Emoji", "MNIST", "Scenes", "Objective", "DenoisingStage", "LatentDiffusion", "AutoencoderKL"}


def keys_of(found: Any) -> set[str]:
    return {row[0].strip("`") for row in parameters(found)}


def owner_of(stage: str, place: str) -> Any:
    """The class or function that has the keys of a place."""
    named = {name.rpartition(".")[2]: name for name in (*STAGES, *DATA.split(), *PARTS)}
    owner = OF.get(place)
    if owner is None:
        owner = config_of(stage)[place.partition(".")[0]]["target"]
    return resolve_name(named.get(owner, owner)) if isinstance(owner, str) else owner


def test_every_key_has_a_change_here():
    walked = set()
    for (stage, place), changes in CHANGES.items():
        owner = owner_of(stage, place)
        walked.add(owner.__name__)
        assert keys_of(owner) - {*INERT.get(owner.__name__, ())} == changes.keys(), owner
    names = {name.rpartition(".")[2] for name in (*STAGES, *DATA.split(), *PARTS)} | {"LoopSettings", "DataSettings"}
    assert walked | ELSEWHERE == names and not walked & ELSEWHERE


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in INERT.items() for key in keys])
def test_keys_without_effect_say_so(name, key):
    (row,) = [row for row in parameters(owner_of("diffusion", UNET)) if row[0] == f"`{key}`"]
    assert "no effect" in row[3] or "for callers" in row[3]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def changed(config: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings; a mapping is merged into one that is there."""
    *path, last = key.split(".")
    for part in path:
        if config.get(part) is None:
            config[part] = {}
        config = config[part]
    config[last] = config[last] | value if isinstance(value, dict) and isinstance(config.get(last), dict) else value


@pytest.fixture
def outcome(inputs, tmp_path, monkeypatch, capsys):
    """`outcome(config)` trains it in a folder of its own and gives all that can be seen of it."""
    calls: list[tuple] = []

    def watch(owner: object, name: str, describe: Callable[..., tuple]) -> None:
        own = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, *describe(*args, **kwargs)))
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def shape(x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        return (*x.shape, x.dtype)

    monkeypatch.setattr(metrics, "perf_counter", lambda: 0.0)  # no run would be like another
    for name in ("conv2d", "linear", "embedding"):
        watch(F, name, shape)
    watch(os, "replace", lambda old, new: (Path(new).name,))
    watch(torch.utils.data.DataLoader, "__init__", lambda self, *a, num_workers=0, **k: (num_workers,))

    def run(config: dict[str, Any]) -> tuple:
        calls.clear()
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path in inputs.iterdir():
            (folder / path.name).symlink_to(path)
        monkeypatch.chdir(folder)
        Path("config.yaml").write_text(json.dumps(config))
        try:
            main(["config.yaml", "--device", "cpu"])
        except (ValueError, OSError) as error:
            return ("refused", str(error))
        files = {}
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name != "config.yaml":
                files[str(path.relative_to(folder))] = None if "tfevents" in path.name else path.read_bytes()
        return "trained", files, capsys.readouterr().out, tuple(calls)

    return run


@pytest.mark.full
@pytest.mark.parametrize(("stage", "place"), CHANGES, ids=map("-".join, CHANGES))
def test_it_has_an_effect_or_is_refused(inputs, outcome, stage, place):
    plain, ignored, broken = {}, [], []
    if stage == "rows" and not (inputs / "rows").exists():
        write_rows(inputs)
    for key, value in CHANGES[stage, place].items():
        if value == {}:  # its keys are walked by themselves, or refused by the constructor
            continue
        beside = {}
        if isinstance(value, dict) and value.keys() == {"to", "with"}:
            value, beside = value["to"], value["with"]
        config = config_of(stage)
        for name, other in beside.items():
            changed(config, name[1:] if name.startswith("/") else f"{place}.{name}", other)
        said = json.dumps(beside, sort_keys=True)
        try:
            if said not in plain:
                plain[said] = outcome(config)
                assert plain[said][0] == "trained", plain[said]
            changed(config, f"{place}.{key}", value)
            if outcome(config) == plain[said]:
                ignored.append(key)
        except Exception as error:  # all are reported together
            broken.append((key, repr(error)[:200]))
    assert not ignored and not broken, f"no effect: {ignored}; not refused in a sentence: {broken}"
