"""A model's answers to the questions of a benchmark, saved as they come.

Each replica answers every n-th question and writes a part beside the answers file; at the end, and when a run that was
stopped goes on, the parts are taken into the file. What is answered is never asked again.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext import command_line
from megatron_ext.distributed import from_rank_zero
from megatron_ext.errors import UserError
from megatron_ext.evaluation import manifest
from megatron_ext.evaluation.answers import AnswersWriter, read_answers
from megatron_ext.evaluation.benchmark import Item
from megatron_ext.generation import prompts
from megatron_ext.generation.likelihood import log_likelihoods
from megatron_ext.generation.sampling import Sampling
from megatron_ext.generation.session import Session

GREEDY = Sampling(temperature=0)


def claim(
    session: Session, checkpoint: Path, items: Sequence[Item], file: Path, max_new_tokens: int, set_aside: bool = False
) -> None:
    """Make ``file`` that of this model's answers to these questions, or go on with one that is. Collective.

    Its manifest, ``<name>.manifest.json``, says what the answers depend on, and every line which question it answers;
    questions that are new, of further splits for example, may be added.

    Args:
        checkpoint: ``.../iter_NNNNNNN``, which the session was loaded from.
        set_aside: answers that were given otherwise are moved away and given anew.

    Raises:
        UserError: the file holds other answers, or answers to other questions.
    """
    settings = {**manifest.model_settings(session, checkpoint), "max_new_tokens": max_new_tokens}

    def made() -> None:
        _collect(file)
        before, other = read_answers(file).records, None
        for item in items:
            if item.id in before and before[item.id].get("asked") != asked(item):
                other = f"question {item.id} was another one when it was answered"
                break
        manifest.claim(file, file.with_suffix(".manifest.json"), settings, other, set_aside)

    from_rank_zero(made)


def asked(item: Item) -> str:
    """8 hexadecimal digits that change with the question, its choices, and its image's name and size."""
    size = item.image.stat().st_size if item.image.is_file() else None
    told = [item.image.name, size, item.question, item.choices, item.bare]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]


def answer(session: Session, items: Sequence[Item], file: Path, max_new_tokens: int) -> int:
    """Answer what ``file`` does not answer yet, the most likely token each time. Collective.

    Questions with choices also get the log-likelihood of each choice, as the whole answer to the bare question.

    Args:
        max_new_tokens: most tokens of an answer.

    Returns:
        Number of items whose image cannot be read; each is named in a line on standard error and left unanswered.
    """
    from_rank_zero(lambda: _collect(file))
    answered = read_answers(file).records
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    todo = [item for item in items if item.id not in answered][replica::replicas]
    writes = parallel_state.get_tensor_model_parallel_rank() == 0
    unreadable = 0
    with command_line.progress(total=len(todo), desc=file.stem, unit=" questions") as bar:
        writer = AnswersWriter(_part(file, replica)) if writes and todo else None
        for start in range(0, len(todo), session.batch_size):
            batch = todo[start : start + session.batch_size]
            readable, codes = [], {}
            for item in batch:
                try:
                    if item.image not in codes:
                        codes[item.image] = session.encode(item.image)
                    readable.append(item)
                except UserError as error:
                    unreadable += 1
                    if writes:
                        print(f"{error}; {item.id} stays without an answer", file=sys.stderr)
            words = session.trained.vocabulary
            requests = [prompts.answer(words, codes[item.image], item.question, max_new_tokens) for item in readable]
            made = session.generator(requests, GREEDY) if requests else []
            ranked = _likelihoods(session, readable, codes)
            for item, tokens in zip(readable, made):
                if writer:
                    writer.write(item.id, words.decode(tokens), asked=asked(item), **ranked.get(item.id, {}))
            bar.update(len(batch))
        if writer:
            writer.close()
    dist.barrier()
    from_rank_zero(lambda: _collect(file))
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, unreadable if writes else 0)
    return sum(counts)


def _likelihoods(session: Session, items: Sequence[Item], codes: dict[Path, list[int]]) -> dict[str, dict]:
    """By item, for those with choices: ``likelihoods``, of each choice and the end of the answer after it."""
    words, ranked = session.trained.vocabulary, {}
    for item in items:
        if item.choices:
            prompt = prompts.answer(words, codes[item.image], item.bare, 0)
            choices = [[*words.encode(choice), words.eod] for choice in item.choices]
            made = log_likelihoods(session.generator, [prompt] * len(choices), choices)
            ranked[item.id] = {"likelihoods": made}
    return ranked


def _part(file: Path, replica: int) -> Path:
    return file.with_name(f"{file.stem}.part{replica}.jsonl")


def _collect(file: Path) -> None:
    """Take the parts of replicas, of this run or one that was stopped, into the answers file."""
    with AnswersWriter(file) as writer:
        for part in sorted(file.parent.glob(f"{file.stem}.part*.jsonl")):
            for record in read_answers(part).records.values():
                if record["id"] not in writer.answered:
                    writer.write(**record)
            part.unlink()
