"""benchmarks/step_time.py: what its cases compute, how they are measured, and that one at a time is in memory."""

import dataclasses
import gc

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_ext.routing.plan import PRESETS
from training_step.cases import CASES, Case, Size, with_bases
from training_step.kernels import kernel_table, profile
from training_step.masked import MaskedStep
from training_step.memory import peak_bytes
from training_step.others import stock_megatron
from training_step.ours import OurStep
from training_step.random_rows import random_rows
from training_step.timing import table, time_cases

SHAPE = ("model.num_layers=4", "model.hidden_size=32", "model.num_attention_heads=2", "optimizer.lr=0.01")
SIZE = Size(SHAPE, vocab_size=64, rows=2, sequence=600, micro_batches=2)


def batch_of(case: Case, size: Size = SIZE):
    return random_rows(case.rows, size.rows * size.micro_batches, size.sequence, size.vocab_size)


def built(build, size: Size, batch, *plan: str):
    return build(size.configuration(plan), size.vocab_size, batch)


def test_every_preset_is_a_case():
    plans = [setting for case in CASES.values() for setting in case.plan]
    assert {f"plan.preset={preset}" for preset in PRESETS} - set(plans) == {
        "plan.preset=dense",
        "plan.preset=dense_lossless",
    }


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_stock_megatron_trains_with_the_distributed_optimizer(one_process, overlap):
    parallel = ("parallel.distributed_optimizer=true", f"parallel.overlap={overlap}", "model.tie_embeddings=true")
    size = dataclasses.replace(SIZE, settings=SHAPE + parallel)
    one_process()
    step = built(stock_megatron, size, batch_of(CASES["dense"]))
    losses = [step() for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["himix", "hmgen"])
def test_masking_computes_what_the_plan_computes(one_process, name):
    one_process()
    batch = batch_of(CASES[name])
    ours, masked = (built(build, SIZE, batch, *CASES[name].plan) for build in (OurStep, MaskedStep))
    dense = built(OurStep, SIZE, batch)
    for _ in range(3):  # the second loss and the third depend on the gradients
        loss = ours()
        assert masked() == pytest.approx(loss, rel=1e-5)
    assert abs(dense() - ours()) > 1e-3


def test_a_plan_that_leaves_tokens_out_needs_less_memory_and_masking_does_not(one_process):
    one_process()
    batch = batch_of(CASES["himix"])  # two documents in a row: attention has segments with more keys than queries
    dense, himix = (built(OurStep, SIZE, batch, *plan) for plan in ([], CASES["himix"].plan))
    masked = built(MaskedStep, SIZE, batch, *CASES["himix"].plan)
    assert peak_bytes(himix) < 0.6 * peak_bytes(dense)
    assert peak_bytes(masked) >= peak_bytes(dense)


def test_peak_memory_is_that_of_what_lives_at_once():
    def step():
        for _ in range(3):
            torch.zeros(1000) + torch.zeros(1000)

    assert peak_bytes(step) == 3 * 4000


def test_two_models_at_a_time_are_in_memory(one_process):
    one_process()
    figures, alive = {}, {}

    def models() -> int:
        gc.collect()
        return sum(isinstance(x, GPTModel) for x in gc.get_objects())

    def record(name: str, of_case: dict) -> None:
        figures[name], alive[name] = of_case, models() - before

    before = models()

    names = with_bases(["himix", "himix by masking", "hmgen"])
    assert names == ["dense on understanding", "himix", "himix by masking", "dense on generation", "hmgen"]
    time_cases(names, SIZE, 1, record)
    assert not [of_case["error"] for of_case in figures.values() if "error" in of_case]
    assert set(alive.values()) == {1}  # the base; what was measured beside it has gone
    himix = figures["himix"]
    assert himix["time_per_flop"] == pytest.approx(himix["ratio"] / himix["flop_ratio"])
    assert 0 < himix["flop_ratio"] == figures["himix by masking"]["flop_ratio"] < 0.5
    assert 0 < himix["optimizer_step_share"] < 1 and 0 < himix["output_head_share"] < 1


def test_a_case_that_fails_stops_no_other(one_process, monkeypatch):
    def build(*_):
        raise RuntimeError("CUDA out of memory\nand more")

    one_process()
    monkeypatch.setitem(CASES, "himix", dataclasses.replace(CASES["himix"], build=build))
    monkeypatch.setitem(CASES, "dense on both", dataclasses.replace(CASES["dense on both"], build=build))
    figures = {}
    time_cases(with_bases(["himix", "himix by masking", "himix_hmgen_share_all"]), SIZE, 1, figures.__setitem__)
    assert figures["himix"] == figures["dense on both"] == {"error": "RuntimeError: CUDA out of memory"}
    assert figures["himix by masking"]["seconds"] > 0
    lines = table(figures).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    empty = " |" * (lines[0].count("|") - 4)
    failed = "failed: RuntimeError: CUDA out of memory"
    assert f"| himix | dense on understanding | {failed} |{empty}" in lines
    assert f"| dense on both | dense on both | {failed} |{empty}" in lines


def test_the_kernel_table_has_the_longest_first_and_adds_up(one_process):
    one_process()
    kernels = profile(built(OurStep, SIZE, batch_of(CASES["dense"])))
    times = [kernel["milliseconds"] for kernel in kernels]
    assert times == sorted(times, reverse=True) and sum(kernel["share"] for kernel in kernels) == pytest.approx(1)
    assert "aten::mm" in [kernel["kernel"] for kernel in kernels[:10]]
    lines = kernel_table(kernels, rows=3).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == [kernel["kernel"] for kernel in kernels[:3]]
