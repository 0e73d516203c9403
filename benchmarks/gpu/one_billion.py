"""Step times with the shape of Llama 3.2 1B and rows of 4096: every preset, masking, and other libraries."""

from gpu.records import Context, NotRun, Record, read
from gpu.steps import Figure
from training_step.cases import CASES, Size, with_bases

PRESETS = ["himix", "hmgen", "himix_hmgen_share_all", "himix_hmgen_share_all_separate", "himix_hmgen_share_partial"]
MASKED = ["himix by masking", "hmgen by masking"]
TIMED = {
    "table_bf16": ["dense", "Hugging Face", *PRESETS, *MASKED],
    "table_te_bf16": ["dense", "stock Megatron-Core", "himix", "hmgen", "himix_hmgen_share_partial", *MASKED],
    "table_te_fp8": ["dense", "stock Megatron-Core", "himix", "hmgen", "himix_hmgen_share_partial"],
}
SETTINGS = {
    "table_bf16": ("model.implementation=local",),
    "table_te_bf16": ("model.implementation=transformer_engine",),
    "table_te_fp8": ("model.implementation=transformer_engine", "training.fp8=current"),
}
OTHERS = {"Hugging Face": "Hugging Face with SDPA", "stock Megatron-Core": "stock Megatron-Core"}
REPEATS = 3


def _figures(step: str) -> dict[str, Figure]:
    figures = {}
    for name in TIMED[step]:
        if name == "dense":
            figures["dense mfu"] = Figure("dense: MFU", at_least=0.45 if step != "table_te_fp8" else None)
            figures["dense gigabytes"] = Figure("dense: peak memory of a step beside weights and optimizer, GB")
        elif name in OTHERS:
            figures[f"{name} ratio"] = Figure(f"dense: time / time of {OTHERS[name]}", at_most=1.0)
        else:
            masked = name in MASKED
            figures[f"{name} ratio"] = Figure(f"{name}: time / dense")
            figures[f"{name} time_per_flop"] = Figure(
                f"{name}: time / dense over FLOPs / dense", at_most=None if masked else 1.10
            )
            figures[f"{name} memory_ratio"] = Figure(f"{name}: peak memory / dense")
    if step == "table_te_fp8":
        figures["speed-up"] = Figure("dense: time in bf16 / time in FP8", at_least=1.25)
    return figures


FIGURES = {step: _figures(step) for step in TIMED}


def size_of(context: Context, step: str) -> Size:
    """The model and step to time."""
    settings = (*SETTINGS[step], f"training.precision={'float32' if context.rehearsal else 'bf16'}")
    files = ("examples/configs/llama-3.2-1b.yaml",)
    if context.rehearsal:
        tiny = ("num_layers=4", "hidden_size=64", "num_attention_heads=4", "num_query_groups=2", "ffn_hidden_size=128")
        settings += tuple(f"model.{setting}" for setting in tiny)
        return Size(settings, vocab_size=256, rows=2, sequence=560, micro_batches=2, files=files)
    return Size(settings, vocab_size=128256, rows=2, sequence=4096, micro_batches=3, files=files)


def measure(context: Context, record: Record) -> None:
    """Time the cases without a result, one by one."""
    from megatron_ext import distributed
    from training_step.timing import table, time_cases

    size, cases = size_of(context, record.step), record.data
    distributed.initialize(size.configuration())

    def add(name: str, figures: dict) -> None:
        cases[name] = figures
        derived = {"gigabytes": figures["memory_bytes"] / 1e9} if "memory_bytes" in figures else {}
        for key, value in (figures | derived).items():
            if f"{name} {key}" in FIGURES[record.step] and value is not None:
                record.figures[f"{name} {key}"] = value
        record.tables["Steps"] = table({name: cases[name] for name in CASES if name in cases})
        record.write()

    todo = [name for name in TIMED[record.step] if name not in cases or "error" in cases[name]]
    time_cases(with_bases(todo), size, 1 if context.rehearsal else REPEATS, add)
    distributed.shut_down()
    in_bf16 = read(record.file)["steps"].get("table_te_bf16", {}).get("data", {}).get("dense", {})
    if "speed-up" in FIGURES[record.step] and "seconds" in in_bf16 and "seconds" in cases["dense"]:
        record.figures["speed-up"] = in_bf16["seconds"] / cases["dense"]["seconds"]
    if failed := [f"{name}: {figures['error']}" for name, figures in cases.items() if "error" in figures]:
        raise NotRun(failed[0]) if len(failed) == len(cases) else RuntimeError("; ".join(failed))
