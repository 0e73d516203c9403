"""Render the page by templates: one HTML file, and Markdown with its pictures as files."""

import base64
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_ext.errors import UserError
from megatron_ext.report.chart import number
from megatron_ext.report.content import content
from megatron_ext.report.gather import gather


def write_report(
    run: Path, file: Path, vq: Path | None = None, benchmarks: Path | None = None, also: Sequence[Path] = ()
) -> dict:
    """Write ``file`` (HTML) and, beside it, the same page in Markdown with a folder ``<name>_files/`` of pictures.

    Args:
        vq: the VQ tokenizer; without it the page has no pictures of the data.
        benchmarks: folder of the benchmarks that ``RUN/scores`` answers; without it the page has no scores.
        also: further runs, one line each.

    Returns:
        The paths, and the last record of ``metrics.jsonl``.

    Raises:
        UserError: ``run`` or one of ``also`` is not a run's folder, a file of the scores cannot be read, or ``file``
            does not end in ``.html``.
    """
    if file.suffix != ".html":
        raise UserError(f"{file}: the page is HTML; give a name that ends in .html")
    data = gather(run, vq, benchmarks)
    values = content(data, [gather(other, benchmarks=benchmarks) for other in also])
    markdown = file.with_suffix(".md")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_render("html", values, lambda _, png: f"data:image/png;base64,{base64.b64encode(png).decode()}"))
    folder = file.with_name(f"{file.stem}_files")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def save(name: str, picture: bytes | str) -> str:
        (folder / name).write_bytes(picture.encode() if isinstance(picture, str) else picture)
        return f"{folder.name}/{name}"

    markdown.write_text(re.sub(r"\n{3,}", "\n\n", _render("md", values, save)))
    return {"html": str(file), "markdown": str(markdown), "last": data.records[-1]}


def _render(language: str, values: dict, link: Callable[[str, bytes | str], str]) -> str:
    """The page in ``language`` (``html``, ``md``); ``link`` gives the URL of a picture from its name and contents."""
    environment = Environment(
        loader=PackageLoader("megatron_ext.report"),
        autoescape=language == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["thousands"] = "{:,}".format
    environment.globals |= {"link": link, "blocks": f"blocks.{language}.j2"}
    return environment.get_template(f"page.{language}.j2").render(values).strip() + "\n"
