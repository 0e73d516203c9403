"""The folder of finished parts, PREFIX.parts/, and joining them to a data set.

::

    settings.json         what the parts were made from and with; every run into this folder must have the same
    UNIT-PART.part.json   written last: this part is complete
    UNIT-PART.{bin,idx,json}   its documents, a data set of its own, unless all its samples were skipped
"""

import gc
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.command_line import progress
from megatron_ext.data import format as data_format
from megatron_ext.data.format import IMAGE, DatasetWriter
from megatron_ext.errors import UserError
from megatron_ext.files import read_json, write_json
from megatron_ext.preprocess.parts import Part, part_name

TOOL = "tools/preprocess_vq.py"


class Store:
    """Parts of the data set at ``prefix``.

    Args:
        prefix: path of the data set to be, without extension.
        settings: what the parts are made from and with; None to take what the folder says.

    Raises:
        UserError: the folder was started with other settings.
    """

    def __init__(self, prefix: str | Path, settings: dict | None = None):
        self.prefix = Path(prefix)
        self.folder = Path(f"{prefix}.parts")
        file = self.folder / "settings.json"
        if settings is None:
            if not file.is_file():
                raise UserError(f"{file}: not found; no shard of {prefix} was prepared here")
        elif not file.is_file():
            write_json(file, settings)
        self.settings = read_json(file)
        if settings is not None and (difference := differing(self.settings, settings)):
            raise UserError(
                f"{self.folder}: started with {difference}; delete that folder, or choose another --out to keep it"
            )

    def done(self, unit: int) -> list[dict]:
        """The manifests of the complete parts of a unit, up to the first that is missing."""
        manifests = []
        while (file := self._file(part_name(unit, len(manifests)))).is_file():
            manifests.append(read_json(file))
        return manifests

    def write(self, part: Part, codes: dict, failures: dict, offset: int) -> dict:
        """Write a part.

        Args:
            codes: VQ codes [h*w] of each image.
            failures: why an image has none; samples with such an image are skipped.
            offset: token id of VQ code 0.

        Returns:
            Its manifest.
        """
        documents, skipped = [], list(part.skipped)
        for name, document in part.documents:
            failed = [item for mode, item in document if mode == IMAGE and item in failures]
            if failed:
                skipped.append({"sample": name, "image": failed[0].name, "reason": failures[failed[0]]})
            else:
                documents.append([(m, codes[item] + offset if m == IMAGE else item) for m, item in document])
        if documents:
            source = {"made_by": TOOL, "part": part.name}
            prefix = self.folder / part.name
            with DatasetWriter(prefix, self.settings["vocabulary"], self.settings["vq"], source) as writer:
                for document in documents:
                    writer.add(document)
        manifest = {
            "samples": part.samples,
            "documents": len(documents),
            "bytes": part.bytes,
            "last": part.last,
            "skipped": skipped,
        }
        write_json(self._file(part.name), manifest)
        return manifest

    def join(self) -> dict:
        """Join all parts to the data set, list what was skipped beside it, and remove the parts.

        Returns:
            The metadata of the data set.

        Raises:
            UserError: a part is missing or damaged, or no sample was usable.
        """
        parts = self._all_parts()
        skipped = [entry for _, manifest in parts for entry in manifest["skipped"]]
        samples = sum(manifest["samples"] for _, manifest in parts)
        if len(skipped) == samples:
            raise UserError(f"{self.prefix}: none of {samples} samples was usable; see 'skipped' in {self.folder}")
        source = {"made_by": TOOL, "samples": samples, "skipped": len(skipped), "settings": self.settings}
        self._remove_temporaries()
        writer = DatasetWriter(self.prefix, self.settings["vocabulary"], self.settings["vq"], source)
        with writer, _nothing_to_collect():
            for name, manifest in progress(parts, desc="joining", unit=" parts", leave=False):
                if manifest["documents"]:
                    data_format.verify(self.folder / name)
                    writer.add_dataset(self.folder / name)
            self._list_skipped(skipped)
        remove_parts(self.prefix)
        return writer.metadata

    def _all_parts(self) -> list[tuple[str, dict]]:
        found = []
        for unit in range(self.settings["units"]):
            manifests = self.done(unit)
            if not manifests or not manifests[-1]["last"]:
                missing = self._file(part_name(unit, len(manifests)))
                raise UserError(f"{missing}: not found; the shard that makes it has not finished")
            found += [(part_name(unit, part), manifest) for part, manifest in enumerate(manifests)]
        return found

    def _list_skipped(self, skipped: list[dict]) -> None:
        file = skipped_file(self.prefix)
        if not skipped:
            file.unlink(missing_ok=True)
            return
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in skipped))
        os.replace(temporary, file)

    def _remove_temporaries(self) -> None:
        """What a join that was killed has left."""
        for file in self.prefix.parent.glob(f".{self.prefix.name}.*.tmp*"):
            file.unlink()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.part.json"


@contextmanager
def _nothing_to_collect():
    """Megatron-Core collects garbage for every part it appends, half a second each in a program with torch loaded."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def skipped_file(prefix: str | Path) -> Path:
    """Where the samples that are not in the data set are listed."""
    return Path(f"{prefix}.skipped.jsonl")


def finished(prefix: str | Path, settings: dict) -> dict | None:
    """The metadata of a data set that is there already, made with these settings and not damaged since; or None.

    Raises:
        UserError: there is one that was made with other settings, or not by this tool.
    """
    file = Path(f"{prefix}.json")
    if not file.is_file():
        return None
    metadata = read_json(file)
    before = metadata.get("source", {}).get("settings") if isinstance(metadata, dict) else None
    if before is None:
        raise UserError(f"{file}: not a data set of this tool's; choose another --out")
    if difference := differing(before, settings):
        raise UserError(f"{file}: made with {difference}; delete it, or choose another --out to keep it")
    try:
        return data_format.Dataset(prefix).metadata
    except UserError as damage:
        print(f"{damage}; made anew")
        return None


def joined(prefix: str | Path) -> dict | None:
    """The metadata of the data set that the parts at ``prefix`` were joined to; None if that is yet to be done."""
    file = Path(f"{prefix}.json")
    if not file.is_file():
        return None
    settings_file = Path(f"{prefix}.parts", "settings.json")
    if not settings_file.is_file():
        return data_format.Dataset(prefix).metadata
    return finished(prefix, read_json(settings_file))


def remove_parts(prefix: str | Path) -> None:
    """Remove the parts, which a data set that is whole makes superfluous."""
    shutil.rmtree(f"{prefix}.parts", ignore_errors=True)


def differing(before: dict, now: dict) -> str | None:
    """A few words on the first setting that is not the same."""
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            was, is_ = before.get(key), now.get(key)
            if key == "inputs":
                return f"other inputs ({_first_difference(was or [], is_)})"
            return f"{key} {_words(was)}, now {_words(is_)}"
    return None


def _first_difference(before: list, now: list) -> str:
    if len(before) != len(now):
        return f"{len(before)} files, now {len(now)}"
    was, is_ = next((a, b) for a, b in zip(before, now) if a != b)
    return f"{was['file']} of {was['bytes']} bytes, now {is_['file']} of {is_['bytes']} bytes"


def _words(value) -> str:
    return value["fingerprint"] if isinstance(value, dict) and "fingerprint" in value else str(value)
