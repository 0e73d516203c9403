"""Conversations about a scene: its questions, some of them with the instruction that a benchmark would give.

A model answers a benchmark's questions only if it has met their instructions, so instruction tuning has them in some
questions (LLaVA-1.5, arXiv 2310.03744, has the same ones); most are left bare.
"""

import random
from collections.abc import Collection

from megatron_ext.picture_world import multiple_choice
from megatron_ext.picture_world.questions import YES_NO, Question, questions
from megatron_ext.picture_world.world import Scene

SHORT = "Answer the question using a single word or phrase."
YES_OR_NO = "Please answer yes or no."
LETTER = "Answer with the option's letter from the given choices directly."


def conversation(
    scene: Scene, turns: int, only: Collection[str] = (), with_choices: float = 0.1, with_instruction: float = 0.3
) -> list[tuple[str, str]]:
    """``turns`` questions with their answers (fewer if the scene allows no more).

    Args:
        only: open questions of these kinds; empty: of all.
        with_choices: share of the turns that are questions with four choices instead, of any kind.
        with_instruction: share of the other short questions that carry an instruction.
    """
    rng = scene.random("conversation")
    made = []
    for question in questions(scene, turns, only):
        chosen = _with_choices(scene, rng) if rng.random() < with_choices else None
        made.append(chosen or (_instructed(question, with_instruction, rng), question.answer))
    return made


def with_letters(question: Question) -> str:
    """A question with its four choices, lettered, as SEED-Bench's are asked."""
    options = [f"{letter}. {choice}" for letter, choice in zip("ABCD", question.choices)]
    return "\n".join([question.text, *options, LETTER])


def _instructed(question: Question, share: float, rng: random.Random) -> str:
    if rng.random() >= share or not question.choices:  # no choices: not a short answer
        return question.text
    # MME has its instruction in the line of the question.
    wordings = (f"\n{SHORT}", f" {YES_OR_NO}") if question.choices == YES_NO else (f"\n{SHORT}",)
    return question.text + rng.choice(wordings)


def _with_choices(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    question = multiple_choice.choose(scene, rng.choice(list(multiple_choice.KINDS)), rng)
    return question and (with_letters(question), "ABCD"[question.choices.index(question.answer)])
