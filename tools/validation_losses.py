"""Validation losses of a checkpoint under other roles than those that it was trained with."""

from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        "Losses of a checkpoint on the validation data of its run, with the roles of training or with others: how\n"
        "much a trained model depends on image tokens in a layer. docs/studies.md explains curves over layers.",
        "python tools/validation_losses.py --checkpoint runs/quickstart/training --roles trained \\\n"
        "      --roles frozen plan.preset=himix plan.himix_start=2 --json losses.json",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FOLDER", help="a checkpoint, or a run (its newest)")
    add(
        "--roles",
        action="append",
        nargs="+",
        required=True,
        metavar=("NAME", "plan.key=value"),
        help="a name, and overrides that set the roles (none: those of training); may be given several times",
    )
    add("--tensor", type=int, default=1, help="tensor-parallel size; further processes are replicas")
    arguments = parser.parse_args()
    roles = {name: overrides for name, *overrides in arguments.roles}
    if len(roles) < len(arguments.roles):
        parser.error("--roles names one set of roles twice")

    # Imported late: --help and bad usage should not wait for Megatron-Core.
    import torch.distributed as dist

    from megatron_ext import distributed
    from megatron_ext.analysis import validation_losses

    losses = validation_losses.of_checkpoint(arguments.checkpoint, roles, arguments.tensor)
    if dist.get_rank() == 0:
        for name, of_name in losses.items():
            print(f"{name}: " + ", ".join(f"{key.removeprefix('validation_')} {x:.4f}" for key, x in of_name.items()))
        if arguments.json:
            files.write_json(arguments.json, losses)
    distributed.shut_down()


if __name__ == "__main__":
    command_line.run(main)
