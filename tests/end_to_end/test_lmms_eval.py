"""lmms-eval on an exported folder, where an environment with lmms-eval is at hand (docs/published_models.md):

LMMS_EVAL_PYTHON=env/bin/python pytest tests/end_to_end/test_lmms_eval.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_ext import distributed
from megatron_ext.config import Config
from support.exported import llama_vocabulary, write_checkpoint
from support.forked_programs import run_forked

PYTHON = os.environ.get("LMMS_EVAL_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LMMS_EVAL_PYTHON names no Python with lmms-eval")


def test_its_answers_are_those_of_the_folder(material, tmp_path):
    run, folder, tasks = tmp_path / "run", tmp_path / "exported", tmp_path / "tasks"
    distributed.initialize(Config())
    write_checkpoint(run, llama_vocabulary(tmp_path / "vocabulary"), "plan.preset=himix_hmgen_share_partial")
    distributed.shut_down()
    run_forked(["tools/export_hf.py", "--checkpoint", run, "--vq", material / "vq", "--out", folder])
    benchmark = ["--benchmark", "pope", "--data", material / "benchmarks" / "pope"]
    run_forked(["tools/lmms_eval_tasks.py", *benchmark, "--out", tasks, "--limit", 12])
    arguments = f"pretrained={folder},trust_remote_code=True,device=cpu,device_map=cpu"
    command = [PYTHON, "-m", "lmms_eval", "--model", "huggingface", "--model_args", arguments]
    command += ["--tasks", "pope_local", "--include_path", tasks, "--batch_size", "1", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | offline
    subprocess.run(
        [*map(str, command), "--output_path", str(tmp_path / "log")], env=environment, check=True, cwd=tmp_path
    )

    (samples,) = (tmp_path / "log").rglob("*_samples_pope_local.jsonl")
    questions, answers = tasks / "pope_local.jsonl", tmp_path / "answers.jsonl"
    run_forked(["tools/lmms_eval_tasks.py", "--samples", samples, "--questions", questions, "--answers", answers])
    logged = {record["id"]: record["answer"].strip() for record in map(json.loads, answers.read_text().splitlines())}
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    assert logged == dict(zip((question["id"] for question in asked), folder_answers(folder, asked), strict=True))
    assert len(logged) == len(asked) >= 9 and len(set(logged.values())) > 1


@torch.no_grad()
def folder_answers(folder: Path, questions: list[dict]) -> list[str]:
    """What the folder's model answers in bf16, question by question."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    answers = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [Image.open(question["image"]).convert("RGB")]
        inputs = processor(text=[text], images=images, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(tokens, skip_special_tokens=True).strip())
    return answers
