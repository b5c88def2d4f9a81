"""CompVis's module names: what they are here, and what imports from them.

`python tests/test_legacy_paths.py` writes the table of names into docs/reference/compvis.md.
"""

import importlib
import inspect
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

import ldm
from ldm import legacy_paths
from ldm.legacy_names import CONFIG_HOMES, ELSEWHERE, HOMES, OLD_NAMES, PACKAGES
from ldm.util import get_obj_from_str

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs/reference/compvis.md"
BEGIN, END = "<!-- names: python tests/test_legacy_paths.py writes this table -->", "<!-- end of names -->"
OWN = ("ldm.util", "ldm.models.autoencoder")  # CompVis's names of files that we have, too

# What research code imports, most used first (the survey of 13 projects and of public code), and from where.
IMPORTED = {
    "ldm.util": "instantiate_from_config get_obj_from_str count_params exists default log_txt_as_img ismap isimage "
    "mean_flat parallel_data_prefetch autocast",
    "ldm.models.diffusion.ddim": "DDIMSampler make_ddim_sampling_parameters make_ddim_timesteps noise_like "
    "extract_into_tensor tqdm partial np torch",
    "ldm.models.diffusion.plms": "PLMSSampler make_ddim_sampling_parameters make_ddim_timesteps noise_like",
    "ldm.models.diffusion.dpm_solver": "DPMSolverSampler",
    "ldm.models.diffusion.dpm_solver.sampler": "DPMSolverSampler",
    "ldm.models.diffusion.sampling_util": "append_dims norm_thresholding spatial_norm_thresholding",
    "ldm.data.base": "Txt2ImgIterableBaseDataset",
    "ldm.data.personalized": "PersonalizedBase per_img_token_list",
    "ldm.data.personalized_style": "PersonalizedBase",
    "ldm.models.autoencoder": "AutoencoderKL VQModelInterface VQModel IdentityFirstStage DiagonalGaussianDistribution "
    "Encoder Decoder VectorQuantizer instantiate_from_config LitEma torch F",
    "ldm.models.diffusion.ddpm": "LatentDiffusion DDPM DiffusionWrapper LatentInpaintDiffusion exists default "
    "extract_into_tensor make_beta_schedule noise_like mean_flat count_params log_txt_as_img ismap isimage LitEma "
    "normal_kl DiagonalGaussianDistribution VQModelInterface IdentityFirstStage AutoencoderKL DDIMSampler "
    "instantiate_from_config disabled_train rearrange repeat tqdm np nn torch",
    "ldm.modules.attention": "CrossAttention BasicTransformerBlock SpatialTransformer MemoryEfficientCrossAttention "
    "SpatialSelfAttention FeedForward GEGLU Normalize zero_module checkpoint default exists rearrange repeat einsum "
    "isfunction math torch nn F",
    "ldm.modules.ema": "LitEma",
    "ldm.modules.embedding_manager": "EmbeddingManager",
    "ldm.modules.image_degradation": "degradation_fn_bsr degradation_fn_bsr_light",
    "ldm.modules.x_transformer": "Encoder TransformerWrapper exists default",
    "ldm.modules.encoders.modules": "FrozenCLIPEmbedder FrozenOpenCLIPEmbedder BERTEmbedder TransformerEmbedder "
    "ClassEmbedder SpatialRescaler FrozenCLIPTextEmbedder FrozenClipImageEmbedder AbstractEncoder",
    "ldm.modules.distributions.distributions": "DiagonalGaussianDistribution DiracDistribution AbstractDistribution "
    "normal_kl",
    "ldm.modules.diffusionmodules.util": "make_beta_schedule betas_for_alpha_bar make_ddim_timesteps "
    "make_ddim_sampling_parameters extract_into_tensor noise_like checkpoint timestep_embedding conv_nd linear "
    "avg_pool_nd zero_module scale_module normalization mean_flat SiLU GroupNorm32 HybridConditioner",
    "ldm.modules.diffusionmodules.openaimodel": "UNetModel EncoderUNetModel AttentionPool2d "
    "TimestepEmbedSequential TimestepBlock ResBlock Downsample Upsample AttentionBlock SpatialTransformer "
    "timestep_embedding checkpoint conv_nd linear avg_pool_nd zero_module normalization exists th np math F",
    "ldm.modules.diffusionmodules.model": "Encoder Decoder ResnetBlock AttnBlock MemoryEfficientAttnBlock Upsample "
    "Downsample Normalize nonlinearity",
    "ldm.modules.losses": "LPIPSWithDiscriminator",
    "ldm.modules.losses.contperceptual": "LPIPSWithDiscriminator DummyLoss hinge_d_loss vanilla_d_loss adopt_weight",
    "ldm.modules.losses.vqperceptual": "VQLPIPSWithDiscriminator hinge_d_loss_with_exemplar_weights "
    "measure_perplexity l1 l2 LPIPS NLayerDiscriminator",
    "ldm.lr_scheduler": "LambdaLinearScheduler LambdaWarmUpCosineScheduler LambdaWarmUpCosineScheduler2",
}

# The table itself


def test_every_home_is_a_file_and_no_package():
    for home in {*OLD_NAMES.values(), *CONFIG_HOMES.values(), *ELSEWHERE} - PACKAGES:
        path = ROOT.joinpath(*home.split("."))
        assert path.with_suffix(".py").is_file() and not path.exists(), home


def test_no_folder_has_the_name_of_an_old_package():
    """A leftover one, even with nothing in it but `__pycache__`, would win as a namespace package."""
    for package in PACKAGES - {"ldm.models.teaching"}:  # nothing imports that one itself
        assert not ROOT.joinpath(*package.split(".")).exists(), package


def test_an_old_name_is_the_home_itself():
    for old, home in OLD_NAMES.items():
        if old not in PACKAGES:
            module = importlib.import_module(old)
            assert module is importlib.import_module(home) and sys.modules[old] is module
            assert module.__name__ == module.__spec__.name == home  # so that it reloads as itself
    package = importlib.import_module("ldm.modules.losses")
    assert (
        package.__path__ == []
        and package.LPIPSWithDiscriminator is importlib.import_module("ldm.compvis.losses").LPIPSWithDiscriminator
    )


@pytest.mark.parametrize("old", IMPORTED)
def test_names_import(old):
    names = IMPORTED[old].split()
    scope = {}
    exec(f"from {old} import {', '.join(names)}", scope)
    assert all(scope[name] is not None for name in names)
    exec(f"from {old} import *", starred := {})
    assert set(names) <= starred.keys()
    assert all(starred[name] is scope[name] for name in names)


def test_every_row_is_tested_and_every_name_is_there():
    assert set(IMPORTED) == {*HOMES, *OWN}
    for home in ELSEWHERE:
        module = legacy_paths.open_home(home)
        for name in module.__all__:
            assert getattr(module, name) is not None, (home, name)


def test_classes_are_the_same_under_both_names():
    from ldm.models.diffusion import ddim, ddpm, dpm_solver, plms  # from a package that is none
    from ldm.modules import attention as old_attention
    from ldm.modules.diffusionmodules import model, openaimodel, util
    from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

    from ldm.models import attention, autoencoder, blocks, unet, vq_autoencoder

    assert old_attention.CrossAttention is attention.CrossAttention and issubclass(
        ddpm.LatentDiffusion, ldm.LatentDiffusion
    )
    assert openaimodel.UNetModel is unet.UNetModel and openaimodel.ResBlock is blocks.ResBlock
    assert model.Encoder is autoencoder.Encoder and autoencoder.VQModel is vq_autoencoder.VQModel
    assert util.timestep_embedding is openaimodel.timestep_embedding is blocks.timestep_embedding
    assert ddpm.DiagonalGaussianDistribution is DiagonalGaussianDistribution is autoencoder.DiagonalGaussianDistribution
    assert ddim is plms and dpm_solver.DPMSolverSampler is ddim.DPMSolverSampler
    assert ddpm.VQModelInterface is autoencoder.VQModelInterface
    assert get_obj_from_str("ldm.modules.attention.CrossAttention") is attention.CrossAttention
    assert openaimodel.th is torch


def missing(name):
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(name)
    assert caught.value.name == name
    return str(caught.value)


def test_unknown_names_fail_as_ever():
    for package in ("ldm", "ldm.modules", "ldm.models.diffusion", "ldm.modules.losses"):
        name = f"{package}.nonsense"
        assert missing(name) == f"No module named '{name}'"
    name = "ldm.modules.attention.nonsense"
    assert missing(name) == f"No module named '{name}'; 'ldm.modules.attention' is not a package"
    for module in ("ldm.util", "ldm.modules.attention", "ldm.modules.losses", "ldm.modules", "ldm.models.diffusion"):
        with pytest.raises(
            ImportError, match=f"cannot import name 'nonsense' from '{HOMES.get(module, module)}|{module}"
        ):
            exec(f"from {module} import nonsense")
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            _ = importlib.import_module(module).nonsense


def test_packages_export_what_compvis_s_do():
    package = importlib.import_module("ldm.modules.losses")
    for name in ("__file__", "__wrapped__", "__cached__", "__builtins__"):
        assert not hasattr(package, name), name
    modules = {"contperceptual", "vqperceptual"}  # once they are imported
    assert set(package.__all__) - modules == {"LPIPSWithDiscriminator"}
    assert inspect.ismodule(package) and "ldm.compvis.losses" in repr(package)


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_nothing_loads_before_it_is_asked_for():
    heavy = "torch numpy transformers open_clip torchvision pandas kornia PIL"
    loaded = f"print(sorted({{m.split('.')[0] for m in sys.modules}} & set('{heavy}'.split())), "
    loaded += "[m for m in sys.modules if m.startswith('ldm.compvis')])"
    old = ["import sys, ldm, ldm.modules, ldm.models.diffusion, ldm.modules.losses, ldm.modules.encoders", loaded]
    old += ["from ldm.modules.diffusionmodules.openaimodel import UNetModel, ResBlock", loaded]
    old += ["from ldm.models.diffusion.ddpm import *", "from ldm.models.diffusion.ddim import *", loaded]
    packages, networks, all_of_it = run("\n".join(old)).splitlines()
    assert packages == "[] []" and networks == "['numpy', 'torch'] []"
    assert not any(name in all_of_it for name in ("transformers", "open_clip", "torchvision", "pandas", "kornia"))


def test_installed_once_and_last():
    legacy_paths.install()
    finders = [finder for finder in sys.meta_path if isinstance(finder, type(legacy_paths.FINDER))]
    assert finders == [legacy_paths.FINDER]
    assert sys.meta_path.index(legacy_paths.FINDER) > sys.meta_path.index(PathFinder)


@pytest.fixture
def extra_files(tmp_path, monkeypatch):
    """A folder whose files are found as `ldm`'s too."""
    monkeypatch.setattr(ldm, "__path__", [*ldm.__path__, str(tmp_path)])
    names = [n for n in sys.modules if n.startswith(("ldm.modules", "ldm.lr_scheduler"))]
    kept = {name: sys.modules.pop(name) for name in names}
    attributes = {name: vars(ldm).pop(name) for name in ("modules", "lr_scheduler") if name in vars(ldm)}
    importlib.invalidate_caches()
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(("ldm.modules", "ldm.lr_scheduler"))]:
        del sys.modules[name]
    sys.modules.update(kept)
    vars(ldm).update(attributes)
    importlib.invalidate_caches()


def test_real_files_win(extra_files):
    (extra_files / "lr_scheduler.py").write_text("mine = 1")
    (extra_files / "modules" / "__pycache__").mkdir(parents=True)  # a leftover; with a file of the project's own
    (extra_files / "modules" / "hint.py").write_text("from ldm.modules.attention import CrossAttention")
    assert importlib.import_module("ldm.lr_scheduler").mine == 1
    assert importlib.import_module("ldm.modules").__path__ != []
    hint = importlib.import_module("ldm.modules.hint")
    # the others are found as before
    assert hint.CrossAttention is importlib.import_module("ldm.models.attention").CrossAttention


def test_a_home_reloads_under_its_old_name(warm_python):
    code = "import importlib, ldm.lr_scheduler as m; from ldm.util import get_obj_from_str as get"
    code += "; f = m.LambdaLinearScheduler; again = importlib.reload(m)"
    code += "; import ldm.compvis.lr_scheduler as home; print(again is m is home)"
    code += "; name = 'ldm.lr_scheduler.LambdaLinearScheduler'; g = get(name); print(g is f, get(name) is g)"
    code += "; print(get(name, reload=True) is g)"
    assert warm_python(code).stdout.split() == ["True", "False", "True", "False"]


# The documentation


def names_table() -> str:
    """One row for each of CompVis's modules: its home, and the names that import from it."""
    rows = ["| CompVis's module | is here | names |", "|---|---|---|"]
    for old, names in sorted(IMPORTED.items()):
        home = HOMES.get(old, old).replace(".", "/")
        rows.append(f"| `{old}` | `{home}.py` | {', '.join(f'`{name}`' for name in names.split())} |")
    return "\n".join(rows)


def test_the_table_in_the_docs_is_current():
    table = DOCS.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert table == names_table(), "run python tests/test_legacy_paths.py"


def test_the_docs_say_how_long_the_compatible_part_is():
    """In all and by what its lines are spent on; off by 5 % at most, so that not every edit is one of the page."""
    counts = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "ldm" / "compvis").glob("*.py")}
    said, _, parts = DOCS.read_text().partition(" lines, of which ")
    total = int(said.split()[-1].replace(",", ""))
    assert total == pytest.approx(sum(counts.values()), rel=0.05)
    found = re.findall(r"(\d+) [^(]+\(((?:`\w+\.py`(?:, )?)+)\)", parts.partition("\n\n")[0])
    assert sum(int(lines) for lines, _ in found) == total - counts.pop("__init__.py")
    for lines, names in found:
        own = [counts.pop(name) for name in re.findall(r"\w+\.py", names)]
        assert int(lines) == pytest.approx(sum(own), rel=0.05), names
    assert not counts  # all of its files are named


if __name__ == "__main__":
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n\n{names_table()}\n\n{END}{rest.partition(END)[2]}")
