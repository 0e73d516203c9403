"""A model's pictures for the prompts of a benchmark, saved as they come.

Each replica draws every n-th prompt. What is in the folder is never drawn again, and a picture has its name only when
it is whole, so a run that was stopped goes on and ends with the same pictures.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext import command_line, distributed
from megatron_ext.evaluation.manifest import model_settings
from megatron_ext.evaluation.mjhq import Prompt
from megatron_ext.evaluation.picture_folder import claim, picture_file, save
from megatron_ext.generation import prompts as requests
from megatron_ext.generation.sampling import Sampling
from megatron_ext.generation.session import Session


def settings_of(session: Session, checkpoint: Path, prompts: str, sampling: Sampling) -> dict:
    """Everything that a picture depends on, as plain data: the manifest of a folder of pictures.

    Args:
        checkpoint: ``.../iter_NNNNNNN``, which the session was loaded from.
        prompts: :func:`mjhq.fingerprint`.
    """
    return {**model_settings(session, checkpoint), "prompts": prompts, **asdict(sampling)}


def draw(
    session: Session,
    prompts: Sequence[Prompt],
    folder: Path,
    sampling: Sampling,
    settings: dict,
    set_aside: bool = False,
) -> int:
    """Draw the pictures that are not in ``folder`` yet. Collective.

    The noise of a picture depends on ``sampling.seed`` and the prompt's number alone, whatever else is drawn with it.

    Args:
        settings: of :func:`settings_of`; the folder's manifest.
        set_aside: pictures that were made otherwise are moved away and drawn anew.

    Returns:
        Number of pictures drawn, by all replicas.

    Raises:
        UserError: the folder holds pictures that were made otherwise.
    """
    missing = distributed.from_rank_zero(lambda: _missing(prompts, folder, settings, set_aside))
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    todo = [prompt for prompt in prompts if prompt.id in missing][replica::replicas]
    writes = parallel_state.get_tensor_model_parallel_rank() == 0
    words, started = session.trained.vocabulary, time.monotonic()
    with command_line.progress(total=len(todo), desc=folder.name, unit=" pictures") as bar:
        for start in range(0, len(todo), session.batch_size):
            batch = todo[start : start + session.batch_size]
            made = session.generator([requests.picture(words, p.prompt, p.number) for p in batch], sampling)
            if writes:
                for prompt, picture in zip(batch, session.pictures(session.codes(made))):
                    save(picture, picture_file(folder, prompt))
            bar.update(len(batch))
    dist.barrier()
    if missing:
        each = (time.monotonic() - started) / len(missing)
        distributed.report(f"{folder}: {len(missing)} pictures drawn, {each:.2f} s each")
    return len(missing)


def _missing(prompts: Sequence[Prompt], folder: Path, settings: dict, set_aside: bool) -> set[str]:
    claim(folder, settings, set_aside)
    return {prompt.id for prompt in prompts if not picture_file(folder, prompt).exists()}
