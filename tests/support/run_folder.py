"""The output folder of a training run that never took place."""

import json
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.config import Config


def write_run(folder: Path, *overrides: str) -> Path:
    """A run of 15 iterations of a model of 3 layers under HMGen, with validation every 5, and a loss that is not a
    number in iteration 7."""
    folder.mkdir(parents=True)
    config = config_file.load(Config, [], ["model.num_layers=3", "plan.preset=hmgen", *overrides, f"output={folder}"])
    config_file.write_yaml(folder / "config.yaml", config)
    records = [
        {
            "iteration": i,
            "consumed_tokens": 100 * i,
            "consumed_flops": 0.75 * i,
            "consumed_dense_flops": 1.0 * i,
            "skipped_steps": 0,
            "mfu": None,
            **dict.fromkeys(("loss_understanding", "loss_generation"), 5 / i if i != 7 else float("nan")),
            **({"validation_loss_generation": 5.5 / i} if i % 5 == 0 else {}),
            **dict.fromkeys(("step_seconds", "data_wait_seconds", "grad_norm", "learning_rate"), 0.5),
            "tokens_per_second": 200.0,
        }
        for i in range(1, 16)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
