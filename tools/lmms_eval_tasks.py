"""Write benchmarks as local tasks of lmms-eval, or turn the answers that it logged into an answers file.

lmms-eval asks an exported model (tools/export_hf.py) the same questions about the same images, by transformers alone.
Its own score counts answers that equal the right one in lower case and without a full stop;
tools/evaluate.py --score scores its answers as it scores this project's.
"""

from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.evaluation.registry import BENCHMARKS, benchmark_named


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python tools/lmms_eval_tasks.py --benchmark pope --data data/pope --benchmark gqa --data data/gqa \\\n"
        "      --out runs/tasks\n"
        "  python -m lmms_eval --model huggingface --model_args pretrained=runs/exported,trust_remote_code=True \\\n"
        "      --tasks pope_local,gqa_local --include_path runs/tasks --log_samples --output_path runs/lmms\n"
        "  python tools/lmms_eval_tasks.py --samples runs/lmms/exported/..._samples_pope_local.jsonl \\\n"
        "      --questions runs/tasks/pope_local.jsonl --answers runs/lmms/pope.jsonl",
    )
    add = parser.add_argument
    add("--benchmark", action="append", default=[], choices=list(BENCHMARKS), help="name; repeatable")
    add("--data", action="append", default=[], type=Path, metavar="FOLDER", help="the benchmark as released")
    add("--out", type=Path, metavar="FOLDER", help="folder of tasks; a benchmark's is NAME_local")
    add("--limit", type=int, default=0, help="about this many questions, spread over the benchmark; 0: all")
    add("--max-new-tokens", type=int, default=16, help="most tokens of an answer (default: %(default)s)")
    add("--samples", type=Path, metavar="FILE", help="what lmms-eval logged about a task")
    add("--questions", type=Path, metavar="FILE", help="the .jsonl of that task")
    add("--answers", type=Path, metavar="FILE", help="the answers file to write from --samples")
    arguments = parser.parse_args()
    if len(arguments.benchmark) != len(arguments.data):
        parser.error("give --data once for each --benchmark")
    if bool(arguments.benchmark) != bool(arguments.out):
        parser.error("--benchmark goes with --out")
    if len({bool(arguments.samples), bool(arguments.questions), bool(arguments.answers)}) > 1:
        parser.error("--samples, --questions and --answers go together")
    if not (arguments.benchmark or arguments.samples):
        parser.error("nothing to do: give --benchmark or --samples")
    # Imported late: --help should not wait for it.
    from megatron_ext.evaluation import lmms_eval

    numbers = {}
    for name, data in zip(arguments.benchmark, arguments.data):
        benchmark = benchmark_named(name)
        items = benchmark.read(data, None)
        if arguments.limit:
            items = benchmark.subset(items, arguments.limit)
        file = lmms_eval.write_task(arguments.out, f"{name}_local", items, arguments.max_new_tokens)
        numbers[f"{name}_local"] = len(items)
        print(f"{file}: {len(items)} questions")
    if arguments.samples:
        numbers["answers"] = lmms_eval.read_samples(arguments.samples, arguments.questions, arguments.answers)
        print(f"{arguments.answers}: {numbers['answers']} answers")
    if arguments.json:
        files.write_json(arguments.json, numbers)


if __name__ == "__main__":
    command_line.run(main)
