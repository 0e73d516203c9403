"""Conversations about a scene: its questions, some of them with the instruction of a benchmark.

A model follows a benchmark's instructions only if training included them, so some questions carry one (the same as in
LLaVA-1.5, arXiv 2310.03744); most do not.
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
        only: kinds of open questions; empty: all kinds.
        with_choices: share of turns that are questions with four choices instead, of any kind.
        with_instruction: share of the other short questions that carry an instruction.
    """
    rng = scene.random("conversation")
    conversation_turns = []
    for question in questions(scene, turns, only):
        lettered = _with_choices(scene, rng) if rng.random() < with_choices else None
        conversation_turns.append(lettered or (_instructed(question, with_instruction, rng), question.answer))
    return conversation_turns


def with_letters(question: Question) -> str:
    """A question with its four lettered choices, in the form of SEED-Bench."""
    options = [f"{letter}. {choice}" for letter, choice in zip("ABCD", question.choices)]
    return "\n".join([question.text, *options, LETTER])


def _instructed(question: Question, share: float, rng: random.Random) -> str:
    if rng.random() >= share or not question.choices:  # no choices: not a short answer
        return question.text
    # MME appends its instruction to the line of the question.
    wordings = (f"\n{SHORT}", f" {YES_OR_NO}") if question.choices == YES_NO else (f"\n{SHORT}",)
    return question.text + rng.choice(wordings)


def _with_choices(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    question = multiple_choice.choose(scene, rng.choice(list(multiple_choice.KINDS)), rng)
    return question and (with_letters(question), "ABCD"[question.choices.index(question.answer)])
