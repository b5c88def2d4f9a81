"""Averages, learning rates, data order and configurations of training."""

import os

import pytest
import torch
from conftest import refused
from torch import nn

from ldm.training.config import read_configs
from ldm.training.ema import EMA, ema_decay
from ldm.training.loader import training_batches
from ldm.training.lr_scheduler import lr_multiplier
from ldm.training.order import EpochBatches, mix_seed


def test_ema_equals_the_recurrence_and_leaves_the_live_weights_alone():
    module, decay = nn.Linear(1, 1, bias=False), 0.3
    module.weight.data.fill_(1.0)
    average, expected = EMA(module, decay), 1.0
    for n in range(1, 6):
        module.weight.data.fill_(float(n * n))
        average.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n * n
    assert average.shadow["weight"].item() == pytest.approx(expected, rel=1e-6)
    with average.applied():
        assert module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == 25.0


def test_ema_skips_frozen_parameters_and_warms_up():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert set(EMA(module).shadow) == {"weight"}
    assert [ema_decay(n, 0.999) for n in (1, 2, 100)] == [2 / 11, 3 / 12, 101 / 110]
    assert ema_decay(10**6, 0.999) == 0.999


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_learning_rate_rises_and_falls_to_zero(name):
    values = [lr_multiplier(step, 100, name, warmup=10) for step in range(100)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))
    assert values[-1] == pytest.approx(0, abs=1e-9)
    middle = values[54]  # half of the 90 steps of decay are done
    assert middle == pytest.approx(0.5, abs=1e-6)


def test_learning_rate_decays_only_over_the_last_share():
    values = [lr_multiplier(step, 100, "linear", decay=0.4) for step in range(100)]
    assert values[:60] == [1.0] * 60
    assert values[79] == pytest.approx(0.5)
    assert [lr_multiplier(s, 10, "constant", warmup=2) for s in range(3)] == [0.5, 1, 1]


def test_learning_rate_steps_down_for_the_last_share():
    # 25 epochs of 10 steps, then 16 at a tenth
    values = [lr_multiplier(step, 410, "step", warmup=2, decay=16 / 41) for step in range(410)]
    assert values == [0.5] + [1.0] * 249 + [0.1] * 160
    assert lr_multiplier(9, 10, "step", decay=0.5, low=0.25) == 0.25
    refused("'stairs' is unknown: use constant, linear, cosine or step", lr_multiplier, 0, 10, "stairs")


def test_order_is_a_permutation_per_epoch_and_resumes_anywhere():
    order = EpochBatches(length=23, batch_size=4, seed=1)
    assert len(order) == 5
    first = list(order)
    assert len({i for batch in first for i in batch}) == 20
    order.epoch = 1
    second = list(order)
    assert first != second
    assert list(order.seek(8)) == second[3:]


def test_processes_share_the_global_batches():
    """Two processes with batches of 2 see between them what one sees with batches of 4."""
    alone = [set(batch) for batch in EpochBatches(16, 4, seed=5)]
    parts = [list(EpochBatches(16, 2, seed=5, rank=rank, processes=2)) for rank in (0, 1)]
    assert [set(a) | set(b) for a, b in zip(*parts, strict=True)] == alone


def test_a_data_set_may_shuffle_in_its_own_way() -> None:
    """Here: the second half first. Every index once, another order in each epoch, each process its part."""

    def shuffled(generator: torch.Generator) -> list[int]:
        first, second = (torch.randperm(8, generator=generator).tolist() for _ in range(2))
        return [index + 8 for index in second] + first

    order = EpochBatches(16, 4, seed=5, shuffled=shuffled)
    once = list(order)
    assert sorted(sum(once, [])) == list(range(16)) and min(once[0] + once[1]) == 8
    parts = [list(EpochBatches(16, 2, 5, rank, 2, shuffled=shuffled)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == once == list(order)
    order.epoch = 1
    assert list(order) != once


def test_batches_go_on_from_any_number_with_the_epoch_set():
    class Counting(torch.utils.data.Dataset):
        epoch = 0

        def __len__(self):
            return 10

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __getitem__(self, index):
            return {"index": index, "epoch": self.epoch, "text": str(index)}

    def take(first, count, workers=0):
        stream = training_batches(Counting(), EpochBatches(10, 3, seed=0).seek(first), workers)
        return [
            (n, b["index"].tolist(), b["epoch"].tolist(), b["text"]) for n, b in (next(stream) for _ in range(count))
        ]

    whole = take(0, 8)
    assert take(0, 8, workers=2) == whole  # they read ahead, in the next epoch, too
    assert [n for n, *_ in whole] == list(range(8))
    assert [epochs[0] for _, _, epochs, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert take(4, 4) == whole[4:]


class Process(torch.utils.data.Dataset):
    """The process that reads a sample, and its epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return {"process": os.getpid(), "epoch": self.epoch}


def test_a_worker_reads_on_in_the_next_epoch():
    """An epoch is one batch: it would start anew for each, and read nothing while the network trains."""
    data, order = Process(), EpochBatches(2, 2, seed=0)
    stream = training_batches(data, order, workers=1)
    found = [(next(stream)[1], data.epoch, order.state_dict()) for _ in range(4)]
    assert [batch["epoch"].tolist() for batch, *_ in found] == [[i, i] for i in range(4)]
    assert [epoch for _, epoch, _ in found] == [state["epoch"] for *_, state in found] == [0, 1, 2, 3]
    assert all(state["past"] == [(2, 1)] for *_, state in found)
    assert len({*torch.cat([batch["process"] for batch, *_ in found]).tolist()} - {os.getpid()}) == 1


@pytest.mark.parametrize("groups", [None, ["a"] * 30 + ["b"] * 17])
def test_an_epoch_goes_on_at_its_next_image_with_batches_of_other_sizes(groups):
    """Of 4 x 2, then 3 x 2 with a state saved in between, then 5: no image twice, and none missed but at the end."""
    images, state, seen = list(range(47)), None, []
    for size, processes, count in ((4, 2, 2), (3, 2, 3), (5, 1, 1)):
        orders = [EpochBatches(47, size, 7, rank, processes, groups) for rank in range(processes)]
        for order in orders:
            order.load_state_dict(order.state_dict() if state is None else state)
        streams = [training_batches(images, order, workers=0) for order in orders]
        seen += [i for _ in range(count) for stream in streams for i in next(stream)[1].tolist()]
        state = orders[0].state_dict()
    remaining = [i for batch in orders[0] for i in batch]
    assert state["images"] == len(seen) == 16 + 18 + 5 and state["number"] == 6
    assert len({*seen, *remaining}) == len(seen + remaining) >= 47 - 4 * len(set(groups or "a"))
    if groups is None:
        assert seen == torch.randperm(47, generator=torch.Generator().manual_seed(mix_seed(7, 0))).tolist()[:39]
    assert orders[0].epoch == 0 and len([next(streams[0]) for _ in range(3)]) == 3 and orders[0].epoch == 1


def test_the_loader_does_not_move_torchs_random_state():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    next(training_batches([{"x": torch.tensor(i)} for i in range(2)], EpochBatches(2, 2, seed=0), workers=0))
    assert torch.rand(1) == expected


def test_seeds():
    seeds = {mix_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500 and all(0 <= s < 2**63 for s in seeds)


YAML = """
name: one
outdir: runs/x
seed: 0
stage: {target: a.B, params: {rate: 0.1, path: "${outdir}/y", lora: null}}
data: {target: c.D, params: {}}
loop: {steps: 5, batch_size: 2}
"""


def test_changes_apply_where_the_key_is(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(YAML.replace("name: one", f"name: {name}"))
    paths = [str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")]
    changes = ["loop.steps=7", "two.loop.steps=9", "outdir=else", "stage.params.rate=1e-3", "loop.ema=0.5"]
    changes += ["one.stage.params.lora.rank=4", "one.stage.params.lora.alpha=2"]
    one, two = read_configs(paths, changes)
    assert (one["loop"]["steps"], two["loop"]["steps"]) == (7, 9)
    assert one["stage"]["params"] == {"rate": 1e-3, "path": "else/y", "lora": {"rank": 4, "alpha": 2}}
    assert two["stage"]["params"]["lora"] is None
    assert one["loop"]["ema"] == 0.5


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (YAML, ["stage.parms.rate=1"], "changes nothing"),
        (YAML, ["lop.steps=1"], r"changes nothing: .*; did you mean loop\.steps\?"),
        (YAML.replace("outdir:", "oudir:"), [], r"has unknown keys oudir: .*; did you mean outdir\?"),
        (YAML, ["nothing=1"], "changes nothing: no given configuration has that key; they have name, outdir"),
        ("a: [", [], "is not yaml"),
        ("name: x", [], "' lacks outdir, seed, stage, data, loop: the keys"),
        (YAML + "extra: 1", [], "yaml' has unknown keys extra: the keys are name"),
        (YAML.replace("${outdir}", "${outdri}"), [], "does not resolve"),
        (YAML.replace("${outdir}/y", "${"), [], "is not yaml"),
        (YAML, ["loop.steps={a"], "cannot be set"),
        (YAML, ["seed=-1"], "seed -1 must be an integer of at least 0"),
        (YAML.replace("target: c.D, ", ""), [], "data must be a mapping with a target and params"),
        (YAML.replace("{target: c.D, params: {}}", "5"), [], "data 5 must be a mapping"),
        (YAML.replace("name: one", "name: 5"), [], "name 5 must be a text"),
        (YAML.replace("name: one", "name: ???"), [], "needs name="),
        (YAML.replace("name: one", "name: ${nmae}"), [], "does not resolve"),
        *(
            (YAML.replace("name: one", f"name: {bad}"), [], "must be that of one folder")
            for bad in ("../../x", "a/b", "..", "''")
        ),
        (YAML, ["outdir=" + "a/" * 1000], "outdir: the path has 1,000 folders within each other"),
        (YAML.replace("runs/x", '"a\\0"'), [], "outdir 'a.x00' must be a text without null characters"),
        (YAML.replace("name: one", 'name: " "'), [], "the name ' ' must be that of one folder"),
        (YAML.replace("name: one", "name: .lock"), [], "'.lock' is that of a file or folder which each run has"),
        (YAML, ["name=previews"], "'previews' is that of a file or folder which each run has"),
        (YAML.replace("runs/x", "null"), [], "outdir None must be a text"),
        (YAML.replace("seed: 0", "seed: true"), [], "seed True must be an integer"),
        (YAML.replace("runs/x", "${oc.env:HOME}"), [], r"has '\$\{oc.env:HOME\}': only references to its other values"),
        (YAML.replace("runs/x", "${${name}:HOME}"), [], "only references to its other values"),
        (YAML.replace("runs/x", r"\\\${name}${oc.decode:x}"), [], "only references to its other values"),
        (YAML.replace("loop: {", f"loop: {{a: {'[' * 2000 + ']' * 2000}, "), [], "not yaml: .*nest|nested too deeply"),
        (
            YAML
            + "a: &a [x, x, x, x]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(4 * ['*' + chr(97 + i)])}]\n" for i in range(15)),
            [],
            "aliases make more than",
        ),
        (YAML.replace("runs/x", "${name}" * 41), [], "has 42 references"),
        ("#" * 2**21, [], "is larger than"),
        ("5", [], "is not yaml"),
    ],
)
def test_bad_configurations_are_named(tmp_path, text, changes, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    refused(message, read_configs, [str(path)], changes)
    refused("'nowhere.yaml' does not exist", read_configs, ["nowhere.yaml"], error=FileNotFoundError)
