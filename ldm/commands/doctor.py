"""Examine a run of latent diffusion that reconstructs well and samples noise: see docs/explanation/common_mistakes.md.

ldm doctor runs/mine/diffusion

A line for each check: ok, suspicious or wrong, the figure, its limit, what to change. The status is 1 if one is wrong.
"""

from collections.abc import Sequence
from pathlib import Path

from ldm.cli import ALLOW, Parser, device_name, int_range


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a run, with config.yaml and a checkpoint")
    add("--images", type=int_range(2), default=256, metavar="N", help="of the run's data to look at, at most (256)")
    what = "training steps at most to learn a batch by heart; 0 leaves this check out (100)"
    add("--overfit", type=int_range(0), default=100, metavar="N", help=what)
    add("--device", default="auto", type=device_name, help="auto, cpu, cuda or mps")
    add("--allow", **ALLOW)
    args = parser.parse_args(argv)

    from ldm.evaluation.doctor import diagnose, open_run
    from ldm.util import pick_device

    findings = diagnose(open_run(args.run, pick_device(args.device)), args.images, args.overfit)
    print(*findings, sep="\n")
    if any(finding.verdict == "wrong" for finding in findings):
        raise SystemExit(1)
