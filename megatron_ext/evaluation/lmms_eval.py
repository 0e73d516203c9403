"""Benchmarks as local tasks of lmms-eval, which asks a model in Hugging Face's format, and its answers as ours.

A folder of tasks is given to lmms-eval with ``--include_path``::

    NAME.yaml     the task                        } the questions, images and right answers of a benchmark
    NAME.jsonl    a question a line               } as this project reads it
    functions.py  what the tasks share: image, question and score
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext import files
from megatron_ext.errors import UserError
from megatron_ext.evaluation.answers import question_fingerprint
from megatron_ext.evaluation.benchmark import Item

_TASK = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.image
doc_to_text: !function functions.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {max_new_tokens}, temperature: 0, do_sample: false}}
process_results: !function functions.score
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
metadata: [{{version: 1.0}}]
"""

_FUNCTIONS = '''\
"""Image, question and score of a question (a line of a task's .jsonl)."""

from PIL import Image


def image(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    """Whether the answer is the right one, in lower case and without a full stop at the end."""
    return {"accuracy": float(results[0].strip().rstrip(".").lower() == doc["answer"].lower())}
'''


def write_task(folder: Path, task: str, items: Sequence[Item], max_new_tokens: int = 16) -> Path:
    """Write a benchmark's questions as the task ``task``; other tasks in ``folder`` stay.

    Raises:
        UserError: an image is missing.
    """
    records = []
    for item in items:
        if not item.image.is_file():
            raise UserError(f"{item.image}: not found; it is the image of question {item.id}")
        record = {"id": item.id, "image": str(item.image.resolve()), "question": item.question, "answer": item.answer}
        records.append(record | {"asked": question_fingerprint(item)})
    questions = folder / f"{task}.jsonl"
    files.write_text(questions, "".join(json.dumps(record) + "\n" for record in records))
    files.write_text(folder / "functions.py", _FUNCTIONS)
    file = folder / f"{task}.yaml"
    settings = {"task": task, "questions": json.dumps(str(questions.resolve())), "max_new_tokens": max_new_tokens}
    files.write_text(file, _TASK.format(**settings))
    return file


def read_samples(samples: Path, questions: Path, answers: Path) -> int:
    """Write the answers that lmms-eval logged (``--log_samples``) as a new answers file, which ``tools/evaluate.py
    --score`` reads.

    Args:
        samples: the log of a task; it names questions by their number in the task.
        questions: the task's .jsonl.

    Returns:
        The number of answers.

    Raises:
        UserError: a file is missing, or a sample is not of this task.
    """
    asked, records = list(_objects(questions)), {}
    for number, sample in enumerate(_objects(samples), start=1):
        try:
            question, answer = asked[sample["doc_id"]], sample["filtered_resps"]
            answer = answer if isinstance(answer, str) else answer[0]
            if sample["input"] != question["question"]:
                raise ValueError("another question")
            records[question["id"]] = {"id": question["id"], "answer": answer, "asked": question["asked"]}
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{samples}:{number}: not a sample of the task in {questions} ({error!r})") from None
    files.write_text(answers, "".join(json.dumps(record) + "\n" for record in records.values()))
    return len(records)


def _objects(file: Path) -> Iterator[dict]:
    """The JSON object in each line."""
    try:
        lines = file.read_text().split("\n")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: {error}") from None
