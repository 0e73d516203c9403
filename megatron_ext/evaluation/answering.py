"""A model's answers to the questions of a benchmark, saved as they come.

Each replica answers every n-th question and writes a part beside the answers file; at the end, and when a run that was
stopped goes on, the parts are taken into the file. What is answered is never asked again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext import command_line
from megatron_ext.errors import UserError
from megatron_ext.evaluation.answers import AnswersWriter, read_answers
from megatron_ext.evaluation.items import Item
from megatron_ext.generation import prompts
from megatron_ext.generation.likelihood import log_likelihoods
from megatron_ext.generation.sampling import Sampling
from megatron_ext.generation.session import Session
from megatron_ext.training.distributed import from_rank_zero

GREEDY = Sampling(temperature=0)


def answer(session: Session, items: Sequence[Item], file: Path, longest: int) -> int:
    """Answer what ``file`` does not answer yet, the most likely token each time. Collective.

    Questions with choices also get the log-likelihood of each choice, as the whole answer to the bare question.

    Args:
        longest: most tokens of an answer.

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
            requests = [prompts.answer(words, codes[item.image], item.question, longest) for item in readable]
            made = session.generator(requests, GREEDY) if requests else []
            ranked = _likelihoods(session, readable, codes)
            for item, tokens in zip(readable, made):
                if writer:
                    writer.write(item.id, words.decode(tokens), **ranked.get(item.id, {}))
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
