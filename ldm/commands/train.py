"""Train the stages that the given configurations describe, in the order given.

    ldm train configs/digits/*.yaml [key=value ...] [--resume]

key=value changes a setting in every configuration that has it (loop.steps=100, outdir=runs/mine); NAME.key=value only
in the stage of that name (diffusion.loop.steps=100). The same command with --resume continues an interrupted run, and
with more steps a finished one. --plan says what each stage would take instead: memory, disk, hours.
"""

from ldm.cli import ALLOW, Parser, device_name


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("arguments", nargs="+", metavar="CONFIG|key=value", help="yaml files, then settings to change")
    parser.add_argument("--resume", action="store_true", help="continue what is there, skip finished stages")
    parser.add_argument("--plan", action="store_true", help="try a few steps, print what training takes, write nothing")
    parser.add_argument("--device", default="auto", type=device_name, help="auto, cpu, cuda or mps")
    parser.add_argument("--allow", **ALLOW)
    args = parser.parse_args(argv)

    from ldm.training.config import read_configs
    from ldm.training.loop import train
    from ldm.training.processes import processes
    from ldm.training.rehearsal import rehearse
    from ldm.util import pick_device

    paths = [argument for argument in args.arguments if "=" not in argument]
    changes = [argument for argument in args.arguments if "=" in argument]
    configs = read_configs(paths, changes)
    state = processes(args.device)
    device = pick_device(state.device if state.num_processes > 1 else args.device)
    if args.plan:
        from ldm.training.plan import print_plans

        return print_plans(configs, args.resume, device, state)
    if state.is_main_process:  # the others wait for it before they read their data
        rehearse(configs, args.resume, device)
    for config in configs:
        result = train(config, args.resume, args.device)
        if state.is_main_process:
            print(f"{config['name']}: {result}", flush=True)
