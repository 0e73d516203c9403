"""A model's answers to the questions of a benchmark, saved as they are generated.

Each replica answers every n-th question and writes a part beside the answers file. At the end, and when a stopped run
resumes, the parts are merged into the file. A question with an answer is not asked again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_ext import chat_template, command_line
from megatron_ext.distributed import decoding_replica, from_rank_zero, writes_for_replica
from megatron_ext.errors import UserError
from megatron_ext.evaluation import manifest
from megatron_ext.evaluation.answers import AnswersWriter, question_fingerprint, read_answers
from megatron_ext.evaluation.benchmark import Item
from megatron_ext.generation import prompts
from megatron_ext.generation.likelihood import log_likelihoods
from megatron_ext.generation.request import Request
from megatron_ext.generation.sampling import Sampling
from megatron_ext.generation.session import Session

GREEDY = Sampling(temperature=0)


def claim(
    session: Session, checkpoint: Path, items: Sequence[Item], file: Path, max_new_tokens: int, set_aside: bool = False
) -> None:
    """Claim ``file`` for this model's answers to these questions, new or to be resumed. Collective.

    The manifest ``<name>.manifest.json`` records what the answers depend on, and every line identifies its question.
    New questions, of further splits for example, may be added.

    Args:
        checkpoint: ``.../iter_NNNNNNN`` from which the session was loaded.
        set_aside: move answers of other settings away instead of refusing.

    Raises:
        UserError: the file holds answers of other settings, or to other questions.
    """
    settings = {**manifest.model_settings(session, checkpoint), "max_new_tokens": max_new_tokens}

    def claim_on_rank_zero() -> None:
        _merge_parts(file)
        before, other = read_answers(file).records, None
        for item in items:
            if item.id in before and before[item.id].get("asked") != question_fingerprint(item):
                other = f"question {item.id} has changed since it was answered"
                break
        manifest.claim(file, file.with_suffix(".manifest.json"), settings, other, set_aside)

    from_rank_zero(claim_on_rank_zero)


def answer(session: Session, items: Sequence[Item], file: Path, max_new_tokens: int) -> int:
    """Answer the questions that ``file`` does not answer yet, by greedy decoding. Collective.

    For questions with choices, the log-likelihood of each choice as the whole answer to the bare question is stored
    too.

    Args:
        max_new_tokens: most tokens of an answer.

    Returns:
        Number of items whose image cannot be read or that the chat template cannot write; each is named with the reason
        on standard error and stays unanswered.

    Raises:
        UserError: the chat template cannot be used at all.
    """
    from_rank_zero(lambda: _merge_parts(file))
    answered = read_answers(file).records
    replica, replicas = decoding_replica()
    todo = [item for item in items if item.id not in answered][replica::replicas]
    writes = writes_for_replica()
    vocabulary, unanswered = session.trained.vocabulary, 0
    with command_line.progress(total=len(todo), desc=file.stem, unit=" questions") as bar:
        writer = AnswersWriter(_part(file, replica)) if writes and todo else None
        for start in range(0, len(todo), session.batch_size):
            batch = todo[start : start + session.batch_size]
            questions, codes = [], {}
            for item in batch:
                question = _question(session, item, codes, max_new_tokens)
                if isinstance(question, _Question):
                    questions.append(question)
                    continue
                unanswered += 1
                if writes:
                    print(f"{question}; {item.id} stays unanswered", file=sys.stderr)
            requests = [question.request for question in questions]
            answers = session.generator(requests, GREEDY) if requests else []
            likelihoods = [_likelihoods(session, question) for question in questions]
            for question, tokens, more in zip(questions, answers, likelihoods):
                if writer:
                    fingerprint = question_fingerprint(question.item)
                    writer.write(question.item.id, vocabulary.decode_answer(tokens), asked=fingerprint, **more)
            bar.update(len(batch))
        if writer:
            writer.close()
    dist.barrier()
    from_rank_zero(lambda: _merge_parts(file))
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, unanswered if writes else 0)
    return sum(counts)


@dataclass
class _Question:
    """An item as the model is asked.

    Attributes:
        bare: the prompt of the choices, one for each.
        choices: the token ids of each choice, with its end.
    """

    item: Item
    request: Request
    bare: list[Request]
    choices: list[list[int]]


def _question(
    session: Session, item: Item, codes: dict[Path, list[int]], max_new_tokens: int
) -> "_Question | UserError":
    """An item as the model is asked, or why it cannot be.

    Args:
        codes: those of pictures that were encoded before; the item's are added.
    """
    vocabulary = session.trained.vocabulary
    if item.image not in codes:
        try:
            codes[item.image] = session.encode(item.image)
        except UserError as error:
            return error
    try:
        request = prompts.answer(vocabulary, codes[item.image], item.question, max_new_tokens)
        bare = [prompts.answer(vocabulary, codes[item.image], item.bare, 0)] * len(item.choices)
        choices = [prompts.answer_tokens(vocabulary, item.bare, choice) for choice in item.choices]
    except chat_template.UnusableConversation as error:
        return error
    return _Question(item, request, bare, choices)


def _likelihoods(session: Session, question: _Question) -> dict[str, list[float]]:
    """``{"likelihoods": log-likelihoods of the choices, each with its end}``, if there are choices."""
    if not question.choices:
        return {}
    return {"likelihoods": log_likelihoods(session.generator, question.bare, question.choices)}


def _part(file: Path, replica: int) -> Path:
    return file.with_name(f"{file.stem}.part{replica}.jsonl")


def _merge_parts(file: Path) -> None:
    """Merge the parts of replicas, of this run or an earlier one, into the answers file."""
    with AnswersWriter(file) as writer:
        for part in sorted(file.parent.glob(f"{file.stem}.part*.jsonl")):
            for record in read_answers(part).records.values():
                if record["id"] not in writer.answered:
                    writer.write(**record)
            part.unlink()
