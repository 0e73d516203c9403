"""Writing edits of scenes as training data and as a benchmark.

::

    OUT/train/images/KEY-0.png, KEY-1.png ...   a scene, and the scene after each edit
    OUT/train/edits.json                        LLaVA's conversations: ``<image>`` and an instruction, then ``<image>``
                                                in the answer, which is drawn; the next instruction, and so on
    OUT/train/scenes.json                       the manifest, written last: settings and fingerprint

    FOLDER/edits.json                           the benchmark: single edits with their scenes before and after them
    FOLDER/images/KEY.png, references/KEY.png   pictures of these scenes
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
from pathlib import Path

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError, check_names
from megatron_ext.files import write_json
from megatron_ext.picture_world.edits import KINDS, make_edits
from megatron_ext.picture_world.split_files import png, write_folder
from megatron_ext.picture_world.world import RICHEST, World

RECORDS = "edits.json"
IMAGE = "<image>"


@dataclass(frozen=True)
class EditConfig:
    """The edits of one split: conversations 0 .. count-1 of 1 to ``turns`` edits of ``kinds`` (empty: of all)."""

    split: str
    count: int
    turns: int = 1
    size: int = 64
    world: World = RICHEST
    kinds: tuple[str, ...] = ()
    seed: int = 1234

    def __post_init__(self):
        check_names("kinds", self.kinds, KINDS)
        if self.count < 0 or self.turns < 1:
            raise UserError(f"edits: count is {self.count} and turns {self.turns}, must be at least 0 and 1")


def write_edits(out: Path, config: EditConfig, workers: Pool | None = None) -> dict:
    """Write OUT/SPLIT, unless it is there with these settings; the manifest is like that of
    :func:`~.split_files.write_split`."""

    def write(folder: Path) -> None:
        (folder / "images").mkdir()
        records = []
        samples = progress(_samples(config, workers), total=config.count, desc="edits", unit="edit", leave=False)
        for record, pictures in samples:
            for name, content in zip(record["image"], pictures):
                (folder / name).write_bytes(content)
            records.append(record)
        write_json(folder / RECORDS, records)

    return write_folder(out / config.split, asdict(config), write)


def make_sample(config: EditConfig, index: int) -> tuple[dict, list[bytes]]:
    """Conversation ``index`` as a LLaVA record and its pictures as PNGs; a pure function of its arguments."""
    edits = make_edits(config.seed, config.split, index, config.world, config.kinds, config.turns)
    key, turns = f"{config.split}-{index:09d}", []
    for edit in edits:
        prompt = edit.instruction if turns else f"{IMAGE}\n{edit.instruction}"
        turns += [{"from": "human", "value": prompt}, {"from": "gpt", "value": IMAGE}]
    scenes = [edits[0].before, *(edit.after for edit in edits)]
    names = [f"images/{key}-{number}.png" for number in range(len(scenes))]
    kinds = [edit.kind for edit in edits]
    record = {"id": key, "image": names, "conversations": turns, "kinds": kinds}
    return record, [png(scene, config.size) for scene in scenes]


def write_edit_benchmark(folder: Path, config: EditConfig) -> int:
    """Write single edits as a benchmark into an existing folder; returns their number."""
    entries = []
    for name in ("images", "references"):
        (folder / name).mkdir()
    for index in range(config.count):
        edit = make_edits(config.seed, config.split, index, config.world, config.kinds)[0]
        key = f"{config.split}-{index:09d}"
        files = f"images/{key}.png", f"references/{key}.png"
        for file, scene in zip(files, (edit.before, edit.after)):
            (folder / file).write_bytes(png(scene, config.size))
        entry = {"id": key, "kind": edit.kind, "image": files[0], "instruction": edit.instruction}
        entries.append({**entry, "reference": files[1], "before": edit.before.to_dict(), "after": edit.after.to_dict()})
    write_json(folder / RECORDS, entries)
    return len(entries)


def _samples(config: EditConfig, workers: Pool | None) -> Iterator[tuple[dict, list[bytes]]]:
    jobs = ((config, index) for index in range(config.count))
    if workers is None:
        return map(_make, jobs)
    return workers.imap(_make, jobs, chunksize=64)


def _make(job: tuple[EditConfig, int]) -> tuple[dict, list[bytes]]:
    return make_sample(*job)
