"""Facts to files."""

from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.report import html, markdown
from megatron_ext.report.content import page
from megatron_ext.report.gather import gather


def write_report(run: Path, vq: Path | None, file: Path) -> dict:
    """Write ``file`` (HTML) and the Markdown beside it.

    Returns:
        The paths, and the last record of ``metrics.jsonl``.

    Raises:
        UserError: ``run`` is no run, or ``file`` is not an ``.html`` file.
    """
    if file.suffix != ".html":
        raise UserError(f"{file}: the page is HTML; give a name that ends in .html")
    facts = gather(run, vq)
    made = page(facts)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(html.render(made))
    markdown.write(made, file.with_suffix(".md"))
    return {"html": str(file), "markdown": str(file.with_suffix(".md")), "last": facts.records[-1]}
