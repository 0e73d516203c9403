"""Writing splits of the picture world in the formats of real data.

::

    OUT/train/train-000000.tar ...   WebDataset: KEY.png, KEY.txt (caption), KEY.json (LLaVA conversations, scene)
    OUT/train/images/KEY.png         an image folder, with
              llava.json             LLaVA's conversations, and
              captions.jsonl         {"image", "caption"}
    OUT/train/text.jsonl             {"text"}: plain texts about further scenes of the split
    OUT/train/scenes.json            the manifest, written last: settings and fingerprint

A split appears only when it is complete. The same settings give the same bytes with any number of workers.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError, check_names
from megatron_ext.files import read_json, write_json
from megatron_ext.picture_world.captions import caption, text
from megatron_ext.picture_world.conversations import conversation
from megatron_ext.picture_world.questions import KINDS
from megatron_ext.picture_world.render import render
from megatron_ext.picture_world.splits import SPLIT_RULE
from megatron_ext.picture_world.world import RICHEST, Scene, World, make_scene

FORMS = ("tar", "folder", "text")
MANIFEST = "scenes.json"
TEXT_SEED_OFFSET = 1_000_003
"""Texts describe other scenes than the pictures: those of the seed plus this number."""


@dataclass(frozen=True)
class SplitConfig:
    """One split: its scenes 0 .. count-1.

    Attributes:
        texts: number of plain texts.
        size: pixels along a side.
        questions, kinds, with_choices, with_instruction: see :func:`.conversations.conversation`.
        forms: formats to write, of :data:`FORMS`.
    """

    split: str
    count: int
    texts: int
    size: int = 64
    world: World = RICHEST
    questions: int = 3
    kinds: tuple[str, ...] = ()
    with_choices: float = 0.1
    with_instruction: float = 0.3
    seed: int = 1234
    forms: tuple[str, ...] = ("tar", "text")
    per_tar: int = 1000

    def __post_init__(self):
        check_names("kinds", self.kinds, KINDS)
        check_names("forms", self.forms, FORMS)
        for name in ("count", "texts", "questions"):
            if getattr(self, name) < 0:
                raise UserError(f"scenes: {name} is {getattr(self, name)}, must be 0 or more")
        for name in ("with_choices", "with_instruction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"scenes: {name} is {getattr(self, name)}, must be from 0 to 1")


@dataclass(frozen=True)
class SceneSample:
    """One picture with its caption and its conversations."""

    key: str
    png: bytes
    caption: str
    conversations: list[dict]
    scene: dict


def make_sample(config: SplitConfig, index: int) -> SceneSample:
    """Scene ``index`` of a split as a sample; a pure function of its arguments."""
    scene = make_scene(config.seed, config.split, index, config.world)
    turns = []
    pairs = conversation(scene, config.questions, config.kinds, config.with_choices, config.with_instruction)
    for question, answer in pairs:
        prompt = question if turns else f"<image>\n{question}"
        turns += [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return SceneSample(scene.key, png(scene, config.size), caption(scene), turns, scene.to_dict())


def png(scene: Scene, size: int) -> bytes:
    """The scene as a PNG of ``size`` x ``size`` pixels."""
    buffer = io.BytesIO()
    render(scene, size).save(buffer, format="PNG")
    return buffer.getvalue()


@contextmanager
def scene_workers(count: int) -> Iterator[Pool | None]:
    """Processes that make scenes for any number of splits; None for one process, this one."""
    if count <= 1:
        yield None
        return
    # An interrupt is for the process that started them, which then ends them. They inherit that it is ignored.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool = get_context("spawn").Pool(count)
    signal.signal(signal.SIGINT, handler)
    with pool:
        yield pool


def write_split(out: Path, config: SplitConfig, workers: Pool | None = None) -> dict:
    """Write OUT/SPLIT, unless it is there with these settings; a split of other settings is replaced.

    Args:
        workers: of :func:`scene_workers`.

    Returns:
        The manifest (the settings, and a fingerprint of every byte written), with ``created``, whether this call wrote
        the split.

    Raises:
        UserError: the manifest of an existing split cannot be read.
    """

    def write(folder: Path) -> None:
        with ExitStack() as stack:
            writers = [stack.enter_context(WRITERS[form](folder, config)) for form in config.forms if form in WRITERS]
            for sample in progress(
                _samples(config, workers), total=config.count, desc=config.split, unit="scene", leave=False
            ):
                for writer in writers:
                    writer.add(sample)
        if "text" in config.forms:
            with (folder / "text.jsonl").open("w") as lines:
                for index in range(config.texts):
                    scene = make_scene(config.seed + TEXT_SEED_OFFSET, config.split, index, config.world)
                    lines.write(json.dumps({"text": text(scene)}) + "\n")

    return write_folder(out / config.split, asdict(config), write)


def write_folder(folder: Path, settings: dict, write: Callable[[Path], None]) -> dict:
    """Let ``write`` fill a folder that then replaces ``folder``, unless that was made with these settings; returns its
    manifest like :func:`write_split`."""
    settings = json.loads(json.dumps(settings))
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        if manifest["settings"] == settings:
            return {**manifest, "created": False}
        shutil.rmtree(folder)  # its manifest shows that it was generated, so it can be generated again
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    manifest = {"settings": settings, "split_rule": SPLIT_RULE, "fingerprint": fingerprint(partial)}
    write_json(partial / MANIFEST, manifest)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return {**manifest, "created": True}


class _Tars:
    """WebDataset shards, written by tarfile: the webdataset writer stores the time and the user in its members."""

    def __init__(self, folder: Path, config: SplitConfig):
        self._folder, self._config = folder, config
        self._count, self._archive = 0, None

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        if self._archive:
            self._archive.close()

    def add(self, sample: SceneSample) -> None:
        if self._count % self._config.per_tar == 0:
            self.__exit__()
            name = f"{self._config.split}-{self._count // self._config.per_tar:06d}.tar"
            self._archive = tarfile.open(self._folder / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._count += 1
        record = {"id": sample.key, "conversations": sample.conversations, "scene": sample.scene}
        self._member(f"{sample.key}.png", sample.png)
        self._member(f"{sample.key}.txt", sample.caption.encode())
        self._member(f"{sample.key}.json", json.dumps(record).encode())

    def _member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._archive.addfile(member, io.BytesIO(content))


class _Folder:
    """An image folder with LLaVA's JSON and a caption JSONL."""

    def __init__(self, folder: Path, config: SplitConfig):
        self._folder, self._records = folder, []
        (folder / "images").mkdir()

    def __enter__(self):
        self._captions = (self._folder / "captions.jsonl").open("w")
        return self

    def __exit__(self, *unused):
        self._captions.close()
        write_json(self._folder / "llava.json", self._records)

    def add(self, sample: SceneSample) -> None:
        image = f"images/{sample.key}.png"
        (self._folder / image).write_bytes(sample.png)
        self._captions.write(json.dumps({"image": image, "caption": sample.caption}) + "\n")
        self._records.append({"id": sample.key, "image": image, "conversations": sample.conversations})


WRITERS = {"tar": _Tars, "folder": _Folder}


def _samples(config: SplitConfig, workers: Pool | None) -> Iterator[SceneSample]:
    """All samples in order."""
    if not WRITERS.keys() & set(config.forms):
        return
    if workers is None:
        yield from (make_sample(config, index) for index in range(config.count))
        return
    yield from workers.imap(_make, ((config, index) for index in range(config.count)), chunksize=64)


def _make(job: tuple[SplitConfig, int]) -> SceneSample:
    return make_sample(*job)


def fingerprint(folder: Path) -> str:
    """Digest of the names and bytes of all files under a folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
