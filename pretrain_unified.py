"""Train a unified vision-language model.

    python pretrain_unified.py --config examples/configs/tiny.yaml training.iterations=20
    torchrun --nproc_per_node 2 pretrain_unified.py --config examples/configs/tiny.yaml parallel.tensor=2

Alone it is a world of one process; under torchrun, or through examples/run_unified_tp4_pp2.sh, it is one rank of
many. Run again with the same output folder, it resumes from the newest complete checkpoint.
"""

from megatron_ext.training import launcher, starts, stop_signals

if __name__ == "__main__":
    stop_signals.remember()

import argparse
import contextlib
import os
import sys
from pathlib import Path

from megatron_ext import command_line, config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError


def main() -> None:
    arguments = parse_arguments()
    try:
        config = config_file.load(Config, arguments.config, arguments.overrides)
    except UserError as error:
        refuse(error)
    try:
        starts.check_refused(config.output)
        # Imported late: --help and mistakes in the configuration should not wait for Megatron-Core.
        from megatron_ext.callbacks import validate_callbacks

        validate_world(config)
        validate_callbacks(config)
    except UserError as error:
        refuse(error, config.output)

    from torch.distributed.elastic.multiprocessing.errors import record

    record(pretrain)(config)  # torchrun then names the rank that failed first


def validate_world(config: Config) -> None:
    """Refuse what cannot run on the ranks there are. If more of the launch's machines would do, some are lost, and the
    exit code tells launchers to try again."""
    from megatron_ext import distributed
    from megatron_ext.training.config_checks import validate

    world = distributed.world_size()
    machines = int(os.environ.get("GROUP_WORLD_SIZE") or 1)
    most = max(machines, int(os.environ.get(launcher.MACHINES) or 1))
    try:
        validate(config, world)
    except UserError as error:
        for count in range(machines + 1, most + 1):
            with contextlib.suppress(UserError):
                validate(config, world // machines * count)
                say(f"{error} (with {machines} of {most} machines)")
                sys.exit(launcher.LOST_PEER)
        raise


def pretrain(config: Config) -> None:
    """Join the other ranks, build the run, resume it, train it."""
    from megatron_ext import distributed
    from megatron_ext.callbacks import build_callbacks
    from megatron_ext.training import lifecycle
    from megatron_ext.training.finished import clear_finished, mark_finished
    from megatron_ext.training.loop import train
    from megatron_ext.training.output_lock import OutputInUse, hold_output
    from megatron_ext.training.run import build_run, describe
    from megatron_ext.training.watch import watching

    output = Path(config.output)
    try:
        distributed.initialize(config)
        stop_signals.admit()
        if reason := lifecycle.told_already():
            stop_signals.ignore()
            distributed.report(f"stopped before training began: {reason}; the same command starts it")
            distributed.shut_down()
            return
        hold_output(output)
        automatic = distributed.from_rank_zero(lambda: starts.begin(output))
        with watching(config):
            run = build_run(config)
            callbacks = build_callbacks(run)
            distributed.report(describe(run))
            rows = config.training.iterations * config.training.global_batch_size
            distributed.report(run.train_data.tree(rows, config.data.sequence_length))
            if distributed.is_logging_rank():
                output.mkdir(parents=True, exist_ok=True)
                config_file.write_yaml(output / "config.yaml", run.config)
                starts.record_start(output, distributed.world_size(), run.progress.iteration, automatic)
                if run.progress.iteration < config.training.iterations:
                    clear_finished(output)
            complete = train(run, callbacks)
            stop_signals.ignore()
            if distributed.is_logging_rank():
                if complete:
                    mark_finished(output, run.progress.iteration)
                starts.record_end(output, run.progress.iteration, complete)
    except OutputInUse as error:  # what is in the folder is another run's
        say(str(error))
        sys.exit(launcher.IN_USE)
    except starts.GivenUp as error:
        refuse(error, config.output)
    except Exception as error:
        starts.record_error(output, int(os.environ.get("RANK", 0)), error)
        raise
    distributed.report(f"trained to iteration {run.progress.iteration}: {output}")
    distributed.shut_down()


def refuse(error: UserError, output: str = "") -> None:
    """End with exit code 2: starting again cannot help."""
    say(str(error))
    if output and is_first():
        starts.refuse(output, str(error))
    sys.exit(launcher.REFUSED)


def say(line: str) -> None:
    """Once, not on every rank, in the log of errors."""
    if is_first():
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a unified vision-language model on Megatron-Core.",
        epilog="example:\n  torchrun --nproc_per_node 2 pretrain_unified.py --config examples/configs/tiny.yaml "
        "parallel.tensor=2\n\nEvery key is documented in megatron_ext/config.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="YAML files, later ones over earlier")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over those of the files")
    arguments = parser.parse_args()
    # argparse gives everything after --config to it.
    arguments.overrides += [a for a in arguments.config if "=" in a]
    arguments.config = [a for a in arguments.config if "=" not in a]
    return arguments


if __name__ == "__main__":
    command_line.run(main)
