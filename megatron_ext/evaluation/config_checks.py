"""Checks of the evaluation section, made before anything is built."""

from megatron_ext.config import Config
from megatron_ext.errors import UserError, check_at_least_one
from megatron_ext.evaluation.registry import BENCHMARKS
from megatron_ext.run_config import EvaluationBenchmark


def validate_evaluation(config: Config) -> None:
    """Refuse evaluations during training that cannot run. A run without them may leave the section unfinished.

    Raises:
        UserError: names the key, its value and what would do.
    """
    evaluation = config.evaluation
    check_at_least_one("evaluation", evaluation, "batch_size", "max_new_tokens")
    if not evaluation.interval:
        return
    if evaluation.interval < 0:
        raise UserError(f"config: 'evaluation.interval' is {evaluation.interval}, must be 0 (never) or more")
    if not evaluation.vq:
        raise UserError("config: 'evaluation.vq' is empty; name the folder of the VQ tokenizer")
    if not (evaluation.benchmarks or evaluation.prompts):
        raise UserError(
            f"config: 'evaluation.interval' is {evaluation.interval}, but evaluation.benchmarks and "
            "evaluation.prompts are both empty; set one of them, or the interval to 0"
        )
    for key in ("guidance", "temperature", "top_k"):
        if not (value := getattr(evaluation, key)) >= 0:
            raise UserError(f"config: 'evaluation.{key}' is {value}, must be 0 or more")
    if not 0 < evaluation.top_p <= 1:
        raise UserError(f"config: 'evaluation.top_p' is {evaluation.top_p}, must be above 0 and at most 1")
    _validate_benchmarks(evaluation.benchmarks)


def _validate_benchmarks(benchmarks: list[EvaluationBenchmark]) -> None:
    for i, benchmark in enumerate(benchmarks):
        key, name = f"evaluation.benchmarks[{i}]", benchmark.name
        if name not in BENCHMARKS:
            raise UserError(f"config: '{key}.name' is {name!r}, must be one of {', '.join(BENCHMARKS)}")
        if name in (earlier.name for earlier in benchmarks[:i]):
            raise UserError(f"config: '{key}.name' is {name!r} again; name each benchmark once")
        for part in benchmark.parts:
            if part not in BENCHMARKS[name].parts:
                known = ", ".join(BENCHMARKS[name].parts)
                raise UserError(f"config: '{key}.parts' has {part!r}, must be one of {known}")
        if benchmark.limit < 0:
            raise UserError(f"config: '{key}.limit' is {benchmark.limit}, must be 0 (all) or more")
