"""Convert a published model in Hugging Face's format to a checkpoint to start from, and write its shape as YAML.

Llama, Mistral, Qwen2 and Qwen3 models are read. Text keeps the model's rows of embedding and head; <eod> gets the row
of the token that ended documents in its training. The other new rows (VQ codes, <pad>, <boi>, <eoi>) get this project's
initial weights, which depend on --seed, scaled to the standard deviation of the model's rows. The vocabulary must have
the model's own text tokens: create it with tools/train_tokenizer.py --from-model. Nothing is downloaded.

A run can also start from the folder itself (checkpoint.load=FOLDER), where every rank reads its own part; it needs the
model's shape, which --shape writes alone.
"""

from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python tools/convert_hf.py --model checkpoints/Qwen3-0.6B --vocabulary runs/vocabulary --out runs/qwen3\n"
        "  python pretrain_unified.py --config my.yaml runs/qwen3/model.yaml checkpoint.load=runs/qwen3/iter_0000000\n"
        "  python tools/convert_hf.py --model checkpoints/Qwen3-0.6B --shape runs/qwen3.yaml\n"
        "  torchrun --nproc_per_node 8 pretrain_unified.py --config my.yaml runs/qwen3.yaml parallel.tensor=8 \\\n"
        "      checkpoint.load=checkpoints/Qwen3-0.6B",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="config.json and safetensors of the model")
    add("--shape", type=Path, metavar="FILE", help="write the model's shape as YAML, and nothing else")
    add("--vocabulary", type=Path, metavar="FOLDER", help="from tools/train_tokenizer.py")
    add("--out", type=Path, metavar="FOLDER", help="receives the checkpoint iter_0000000 and model.yaml")
    add("--seed", type=int, default=1234, help="seed of the rows that the model does not have (default: 1234)")
    arguments = parser.parse_args()
    if arguments.shape and (arguments.vocabulary or arguments.out):
        parser.error("--shape goes without --vocabulary and --out")
    if not arguments.shape and not (arguments.vocabulary and arguments.out):
        parser.error("give --vocabulary and --out, or --shape")
    # Imported late: --help should not wait for Megatron-Core.
    from megatron_ext.conversion.published_model import convert_published, write_shape
    from megatron_ext.hugging_face.folder import ModelFolder
    from megatron_ext.vocabulary import Vocabulary

    if arguments.shape:
        print(write_shape(ModelFolder(arguments.model), arguments.shape))
        return
    numbers = convert_published(arguments.model, Vocabulary(arguments.vocabulary), arguments.out, arguments.seed)
    if arguments.json:
        files.write_json(arguments.json, numbers)
    rows = numbers["rows"]
    left_out = f", {rows['left_out']:,} of the model's left out" if rows["left_out"] else ""
    print(
        f"{numbers['parameters']:,} parameters in {numbers['precision']}; of {rows['published'] + rows['new']:,} "
        f"tokens {rows['published']:,} start as the model's, {rows['new']:,} are new{left_out}; train with\n"
        f"  --config my.yaml {numbers['config']} checkpoint.load={numbers['checkpoint']}"
    )


if __name__ == "__main__":
    command_line.run(main)
