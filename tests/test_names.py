"""One name, one definition: no public top-level name of `ldm` is defined in two modules."""

import ast
from collections import defaultdict
from pathlib import Path

LDM = Path(__file__).parents[1] / "ldm"
EXCEPTIONS = {
    "CompVis's own names, which its callers import from both places": "Downsample Encoder Upsample",
    "the core's class and CompVis's form of it, by CompVis's name": "ClassEmbedder DiffusionWrapper "
    "IdentityFirstStage LatentDiffusion PersonalizedBase SpatialRescaler",
}
# Still to be given one definition each, by the room whose work that is.
PENDING = {
    "checkpoint": "PLAIN TEXT_KEYS",
    "conditioning": "LAYERS SPECIAL WEIGHTS parse",
    "data": "nearest",
    "evaluation": "FRAMES Objective compare load_network measure",
    "finetune": "FORMATS KEYS PRECISIONS check_model",
    "inference": "autoguidance perturbed_attention",
}


def definitions(path: Path) -> set[str]:
    """Return the public names that a module's top level defines; what it imports is not among them."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_is_defined_once():
    modules = defaultdict(list)
    for path in sorted(LDM.rglob("*.py")):
        for name in definitions(path):
            modules[name].append(str(path.relative_to(LDM)))
    repeated = {name: places for name, places in modules.items() if len(places) > 1}
    exceptions, pending = (
        {name for names in table.values() for name in names.split()} for table in (EXCEPTIONS, PENDING)
    )
    assert {n: places for n, places in repeated.items() if n not in exceptions | pending} == {}
    assert exceptions <= repeated.keys(), "these need no exception any more"
