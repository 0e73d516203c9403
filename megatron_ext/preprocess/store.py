"""The folder of finished parts, PREFIX.parts/, and joining them to a data set.

::

    settings.json              inputs and settings of the parts; every run into this folder must have the same
    UNIT-PART.{bin,idx,json}   the documents of a part, a data set of its own; absent if all its samples were skipped
    UNIT-PART.part.json        the part's manifest, written last: the part is complete
"""

import json
import shutil
from pathlib import Path

from megatron_ext.data import format as data_format
from megatron_ext.data.copying import merge
from megatron_ext.data.format import is_image
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.errors import UserError
from megatron_ext.files import read_json, write_json, write_text
from megatron_ext.preprocess.parts import Part, part_name

TOOL = "tools/preprocess_vq.py"


class Store:
    """Parts of the data set at ``prefix``.

    Args:
        prefix: path of the future data set, without extension.
        settings: inputs and settings of the parts; None to take those stored in the folder.

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
        """The manifests of the complete parts of a unit, up to the first missing one."""
        manifests = []
        while (file := self._file(part_name(unit, len(manifests)))).is_file():
            manifests.append(read_json(file))
        return manifests

    def write(self, part: Part, codes: dict, failures: dict, offset: int) -> dict:
        """Write a part.

        Args:
            codes: VQ codes [h*w*D] of each image, as ``VQModel.encode`` orders them.
            failures: why an image has no codes; samples with such an image are skipped.
            offset: token id of VQ code 0.

        Returns:
            The part's manifest.
        """
        documents, skipped = [], list(part.skipped)
        for name, of_sample in part.documents:
            images = [item for document in of_sample for mode, item in document if is_image(mode)]
            if failed := [image for image in images if image in failures]:
                skipped.append({"sample": name, "image": failed[0].name, "reason": failures[failed[0]]})
            else:
                documents += [
                    [(mode, codes[item] + offset if is_image(mode) else item) for mode, item in document]
                    for document in of_sample
                ]
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
            **_nonzero(filtered=part.filtered, missing_images=part.missing),
        }
        write_json(self._file(part.name), manifest)
        return manifest

    def join(self) -> dict:
        """Join all parts to the data set, list the skipped samples beside it, and remove the parts.

        Returns:
            The metadata of the data set.

        Raises:
            UserError: a part is missing or damaged, or no sample was usable.
        """
        parts = self._all_parts()
        skipped = [entry for _, manifest in parts for entry in manifest["skipped"]]
        samples = sum(manifest["samples"] for _, manifest in parts)
        filtered, missing = (
            sum(manifest.get(key, 0) for _, manifest in parts) for key in ("filtered", "missing_images")
        )
        lost = skipped_samples(skipped)
        if lost + filtered == samples:
            raise UserError(
                f"{self.prefix}: none of {samples} samples was usable, {filtered} were filtered out; see 'skipped' in "
                f"{self.folder}"
            )
        counts = {
            "samples": samples,
            "skipped": lost,
            **_nonzero(
                skipped_documents=sum(entry.get("documents", 0) for entry in skipped),
                filtered=filtered,
                missing_images=missing,
            ),
        }
        source = {"made_by": TOOL, **counts, "settings": self.settings}
        self._remove_temporaries()
        self._list_skipped(skipped)  # before the data set, which is complete then
        try:
            metadata = merge([self.folder / name for name, part in parts if part["documents"]], self.prefix, source)
        except BaseException:
            self._list_skipped([])
            raise
        remove_parts(self.prefix)
        return metadata

    def _all_parts(self) -> list[tuple[str, dict]]:
        parts = []
        for unit in range(self.settings["units"]):
            manifests = self.done(unit)
            if not manifests or not manifests[-1]["last"]:
                missing = self._file(part_name(unit, len(manifests)))
                raise UserError(f"{missing}: not found; the shard that makes it has not finished")
            parts += [(part_name(unit, part), manifest) for part, manifest in enumerate(manifests)]
        return parts

    def _list_skipped(self, skipped: list[dict]) -> None:
        file = skipped_file(self.prefix)
        if not skipped:
            file.unlink(missing_ok=True)
            return
        write_text(file, "".join(json.dumps(entry) + "\n" for entry in skipped))

    def _remove_temporaries(self) -> None:
        """Remove the leftovers of a killed join."""
        for file in self.prefix.parent.glob(f".{self.prefix.name}.*.tmp*"):
            file.unlink()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.part.json"


def _nonzero(**counts: int) -> dict[str, int]:
    return {key: count for key, count in counts.items() if count}


def skipped_samples(skipped: list[dict]) -> int:
    """How many samples a list of what was skipped has as a whole."""
    return sum("documents" not in entry for entry in skipped)


def skipped_file(prefix: str | Path) -> Path:
    """The file that lists the samples, and documents of samples, missing from the data set."""
    return Path(f"{prefix}.skipped.jsonl")


def finished(prefix: str | Path, settings: dict) -> dict | None:
    """The metadata of an existing data set that was made with these settings and is undamaged; None otherwise.

    Raises:
        UserError: the data set there was made with other settings, or not by this tool.
    """
    file = Path(f"{prefix}.json")
    if not file.is_file():
        return None
    metadata = read_json(file)
    before = metadata.get("source", {}).get("settings") if isinstance(metadata, dict) else None
    if before is None:
        raise UserError(f"{file}: not a data set made by {TOOL}; choose another --out")
    if difference := differing(before, settings):
        raise UserError(f"{file}: made with {difference}; delete it, or choose another --out to keep it")
    try:
        return data_format.Dataset(prefix).metadata
    except UserError as damage:
        print(f"{damage}; making it again")
        return None


def joined(prefix: str | Path) -> dict | None:
    """The metadata of the data set that the parts at ``prefix`` were joined to; None if they are not joined yet."""
    file = Path(f"{prefix}.json")
    if not file.is_file():
        return None
    settings_file = Path(f"{prefix}.parts", "settings.json")
    if not settings_file.is_file():
        return data_format.Dataset(prefix).metadata
    return finished(prefix, read_json(settings_file))


def remove_parts(prefix: str | Path) -> None:
    """Remove the parts, which a complete data set no longer needs."""
    shutil.rmtree(f"{prefix}.parts", ignore_errors=True)


def differing(before: dict, now: dict) -> str | None:
    """A description of the first setting that differs; None if none does."""
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            old, new = before.get(key), now.get(key)
            if key == "inputs":
                return f"other inputs ({_first_difference(old or [], new)})"
            return f"{key} {_readable(old)}, now {_readable(new)}"
    return None


def _first_difference(before: list, now: list) -> str:
    if len(before) != len(now):
        return f"{len(before)} files, now {len(now)}"
    old, new = next((a, b) for a, b in zip(before, now) if a != b)
    return f"{_input(old)}, now {_input(new)}"


def _input(entry: dict) -> str:
    """An entry of ``inputs`` (:func:`.units.identity`)."""
    files = f" in {entry['files']} files ({entry['hash']})" if "files" in entry else ""
    return f"{entry['file']} of {entry['bytes']} bytes{files}"


def _readable(value) -> str:
    return value["fingerprint"] if isinstance(value, dict) and "fingerprint" in value else str(value)
