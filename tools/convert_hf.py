"""Convert a Hugging Face Llama to a checkpoint to start from, and write its shape as YAML to lay over a configuration.

Text keeps Llama's rows of embedding and head; <eod> gets the row of </s>. The other new rows (VQ codes, <pad>, <boi>,
<eoi>) get this project's initial weights, which depend on --seed, scaled to the standard deviation of Llama's rows.
The vocabulary must have Llama's own text pieces: create it with tools/train_tokenizer.py --from-model. Nothing is
downloaded.
"""

from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python tools/convert_hf.py --llama checkpoints/llama-2-7b --vocabulary runs/vocabulary --out runs/llama\n"
        "  python pretrain_unified.py --config my.yaml runs/llama/model.yaml checkpoint.load=runs/llama/iter_0000000",
    )
    parser.add_argument(
        "--llama", type=Path, required=True, metavar="FOLDER", help="config.json and safetensors of LlamaForCausalLM"
    )
    parser.add_argument(
        "--vocabulary", type=Path, required=True, metavar="FOLDER", help="from tools/train_tokenizer.py"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="receives the checkpoint iter_0000000 and model.yaml"
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="seed of the rows that Llama does not have (default: 1234)"
    )
    arguments = parser.parse_args()
    # Imported late: --help should not wait for Megatron-Core.
    from megatron_ext.conversion.llama import convert_llama
    from megatron_ext.vocabulary import Vocabulary

    numbers = convert_llama(arguments.llama, Vocabulary(arguments.vocabulary), arguments.out, arguments.seed)
    if arguments.json:
        files.write_json(arguments.json, numbers)
    rows = numbers["rows"]
    left_out = f", {rows['left_out']:,} of Llama's left out" if rows["left_out"] else ""
    print(
        f"{numbers['parameters']:,} parameters in {numbers['precision']}; of {rows['llama'] + rows['new']:,} tokens "
        f"{rows['llama']:,} start as Llama's, {rows['new']:,} are new{left_out}; train with\n"
        f"  --config my.yaml {numbers['config']} checkpoint.load={numbers['checkpoint']}"
    )


if __name__ == "__main__":
    command_line.run(main)
