"""Show the training data of a run: the mixture as a tree, some decoded rows, and the share of padding."""

from megatron_ext import config_file
from megatron_ext.command_line import parser, run
from megatron_ext.config import Config
from megatron_ext.data import PackedRows, build_mixture
from megatron_ext.data.format import verify
from megatron_ext.data.show import describe_row, statistics
from megatron_ext.files import write_json
from megatron_ext.vocabulary import Vocabulary


def main() -> None:
    arguments = parser(__doc__, "python tools/show_data.py --config examples/configs/tiny.yaml --rows 2")
    arguments.add_argument("--config", nargs="+", default=[], metavar="FILE", help="as for pretrain_unified.py")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for pretrain_unified.py")
    arguments.add_argument(
        "--validation", action="store_true", help="show the validation mixture instead of the training one"
    )
    arguments.add_argument("--first", type=int, default=0, metavar="N", help="first row to print (default 0)")
    arguments.add_argument("--rows", type=int, default=1, metavar="N", help="rows to print (default 1)")
    arguments.add_argument("--sample", type=int, default=256, metavar="N", help="rows to measure (default 256)")
    arguments.add_argument("--verify", action="store_true", help="check every byte of the files first")
    options = arguments.parse_intermixed_args()

    settings = [*options.config, *options.overrides]  # argparse gives everything after --config to it
    config = config_file.load(Config, [s for s in settings if "=" not in s], [s for s in settings if "=" in s])
    vocabulary = Vocabulary(config.data.vocabulary)
    sources = config.data.validation if options.validation else config.data.train
    if options.verify:
        for path in dict.fromkeys(source.path for source in sources):
            verify(path)
            print(f"{path}: all files match the metadata")
    mixture = build_mixture(sources, config.data, vocabulary, train=not options.validation)
    training = config.training
    steps = training.validation_batches if options.validation else training.iterations
    print(mixture.tree(steps * training.global_batch_size, config.data.sequence_length))

    rows = PackedRows.of(mixture, config.data)
    for row in range(options.first, options.first + options.rows):
        print(describe_row(rows, row, vocabulary))
    measured = statistics(rows.batch(0, options.sample))
    print(f"first {options.sample} rows: " + ", ".join(f"{key} {value:.3g}" for key, value in measured.items()))
    if options.json:
        write_json(options.json, {"fingerprint": mixture.fingerprint, "rows": options.sample, **measured})


if __name__ == "__main__":
    run(main)
