"""A page as one HTML file: no script, nothing fetched, pictures inside."""

import base64
from collections.abc import Sequence
from html import escape

from megatron_ext.report.blocks import (
    Block,
    Commands,
    Figure,
    Node,
    Page,
    Picture,
    Samples,
    Section,
    Table,
    Text,
    Tiles,
    Tree,
)
from megatron_ext.report.theme import PAGE_CSS, SVG_CSS


def render(page: Page) -> str:
    """The HTML text of a page."""
    sections = "\n".join(_section(section) for section in page.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<style>{SVG_CSS}{PAGE_CSS}</style>
</head>
<body>
<main>
<header><h1>{escape(page.title)}</h1><p>{escape(page.subtitle)}</p></header>
{sections}
<footer>{escape(page.footer)}</footer>
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    heading = f"<h2>{escape(section.title)}</h2>" if section.title else ""
    return f"<section>{heading}{_blocks(section.blocks)}</section>"


def _blocks(blocks: Sequence[Block]) -> str:
    """Neighbouring narrow figures share a grid."""
    parts, grid = [], []
    for block in [*blocks, None]:
        if isinstance(block, Figure) and not block.wide:
            grid.append(_figure(block))
            continue
        if grid:
            parts.append(f'<div class="grid-of-figures">{"".join(grid)}</div>')
            grid = []
        if block is not None:
            parts.append(_RENDERERS[type(block)](block))
    return "".join(parts)


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure class="{"wide" if figure.wide else ""}">{figure.svg}{caption}</figure>'


def _tiles(tiles: Tiles) -> str:
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in tiles.tiles)
    return f'<div class="tiles">{cells}</div>'


def _table(table: Table) -> str:
    kind = "words" if table.words else "numbers"
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    head = f"<thead><tr>{head}</tr></thead>" if any(table.head) else ""
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{rows}</tbody></table></div>'


def _tree(tree: Tree) -> str:
    return f'<ul class="tree">{"".join(map(_node, tree.roots))}</ul>'


def _node(node: Node) -> str:
    share = "" if node.share is None else f"<em>{100 * node.share:.3g} %</em>"
    bar = "" if node.share is None else f'<i class="{node.colour}" style="width:{100 * node.share:.2f}%"></i>'
    children = f"<ul>{''.join(map(_node, node.children))}</ul>" if node.children else ""
    details = f"<small>{escape(node.details)}</small>" if node.details else ""
    return f"<li><div><span>{escape(node.label)}</span>{share}{details}</div><u>{bar}</u>{children}</li>"


def _samples(samples: Samples) -> str:
    cards = "".join(
        f'<div><img alt="{escape(text)}" src="{_data_uri(png)}"><h3 class="{task}">{task}</h3>'
        f"<p>{escape(text).replace(chr(10), '<br>')}</p></div>"
        for png, task, text in samples.samples
    )
    return f'<div class="samples">{cards}</div>'


def _picture(picture: Picture) -> str:
    return (
        f'<figure class="wide"><img alt="{escape(picture.caption)}" src="{_data_uri(picture.png)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _commands(commands: Commands) -> str:
    return "".join(
        f'<div class="command"><p>{escape(what)}</p><pre><code>{escape(command)}</code></pre></div>'
        for what, command in commands.commands
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


_RENDERERS = {
    Tiles: _tiles,
    Text: lambda block: f'<p class="note">{escape(block.text)}</p>',
    Table: _table,
    Figure: _figure,
    Picture: _picture,
    Tree: _tree,
    Samples: _samples,
    Commands: _commands,
}
