"""The same global batch gives the same loss and gradients under every parallel layout and every plan."""

import pytest

import parity
from support.forked_programs import run_forked


@pytest.mark.parametrize(
    "layouts, plans, settings",
    [
        ("tp2-sp,pp2-vp2,tp1-dp2,tp2-pp4-vp2-sp,pp2-vp2-cp2", "rank 4 per task", []),
        (
            "tp2-pp2-sp,pp2-vp2-dp2,cp2",
            "dense,himix_hmgen_share_all_separate,interleaved documents,4 codes",
            ["model.tie_embeddings=true", "training.recompute=full", "model.max_image_tokens=64"],
        ),
        (
            # Without sequence parallelism only qk_layernorm makes Megatron-Core sum the norms' gradients over ranks.
            "tp2,tp2-pp2-sp",
            "himix_hmgen_share_partial,drawn tables",
            ["model.qkv_bias=true", "model.qk_norm=true", "model.head_size=12", "training.z_loss=0.01"],
        ),
        (
            "tp2",
            "4 codes",
            ["model.image_codes.codebook=''", "model.image_codes.width=null", "training.means=modality"],
        ),
    ],
    ids=["untied", "tied-recomputed", "bias-and-norms", "learned-codes"],
)
def test_layouts_agree_with_one_process(monkeypatch, layouts, plans, settings):
    def launch(size: int, arguments: list[str], minutes: float) -> None:
        run_forked(["benchmarks/parity.py", *arguments], size, seconds=60 * minutes)

    monkeypatch.setattr(parity, "launch", launch)
    layouts, plans = layouts.split(","), plans.split(",")
    results = parity.compare(["tp1", *layouts], plans, settings, minutes=30)
    assert set(results) == {"tp1", *layouts}
    for layout, of_plan in results.items():
        assert set(of_plan) == set(plans)
        for plan, errors in of_plan.items():
            assert errors and all(error < 1e-5 for error in errors.values()), (layout, plan, errors)
