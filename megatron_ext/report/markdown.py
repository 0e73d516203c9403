"""The same page in Markdown, its drawings and pictures as files in a folder beside it."""

import shutil
from pathlib import Path

from megatron_ext.report.blocks import (
    Commands,
    Figure,
    Node,
    Page,
    Picture,
    Samples,
    Table,
    Text,
    Tiles,
    Tree,
)
from megatron_ext.report.theme import SVG_CSS


def write(page: Page, file: Path) -> None:
    """Write the page to ``file`` and its pictures to ``<file without .md>_files/``, replacing those of before."""
    folder = file.with_name(f"{file.stem}_files")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts = [f"# {page.title}", page.subtitle]
    for section in page.sections:
        if section.title:
            parts.append(f"## {section.title}")
        parts += [_block(block, folder) for block in section.blocks]
    file.write_text("\n\n".join([*parts, "---", page.footer]) + "\n")


def _block(block, folder: Path) -> str:
    match block:
        case Tiles():
            return "\n".join(f"- **{value}** {label}" for value, label in block.tiles)
        case Text():
            return block.text
        case Table():
            return _table(block)
        case Figure():
            drawing = block.svg.replace(">", f"><style>{SVG_CSS}</style>", 1)
            shown = _file(folder, f"{block.name}.svg", drawing.encode(), block.title)
            return f"{shown}\n\n{block.caption}".strip()
        case Picture():
            return f"{_file(folder, f'{block.name}.png', block.png, block.caption)}\n\n{block.caption}"
        case Tree():
            return "\n".join(line for root in block.roots for line in _tree(root, 0))
        case Samples():
            rows = [
                [_file(folder, f"{block.name}-{i}.png", png, task), task, text.replace("\n", "<br>")]
                for i, (png, task, text) in enumerate(block.samples)
            ]
            return _table(Table(["picture", "task", "text"], rows, words=True))
        case Commands():
            return "\n\n".join(f"{what}:\n\n```bash\n{command}\n```" for what, command in block.commands)


def _table(table: Table) -> str:
    line = [":--"] + [":--" if table.words else "--:"] * (len(table.head) - 1)
    cells = [table.head, line, *([cell.replace("|", "\\|") for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _tree(node: Node, depth: int) -> list[str]:
    share = "" if node.share is None else f" {100 * node.share:.3g} %"
    details = f" ({node.details})" if node.details else ""
    label = f"`{node.label}`" if depth else f"**{node.label}**"
    return [f"{'  ' * depth}- {label}{share}{details}"] + [x for n in node.children for x in _tree(n, depth + 1)]


def _file(folder: Path, name: str, content: bytes, title: str) -> str:
    (folder / name).write_bytes(content)
    return f"![{title}]({folder.name}/{name})"
