"""What a page is made of; the renderers know how each of these looks."""

from dataclasses import dataclass, field


@dataclass
class Tiles:
    """Headline numbers: (value, label)."""

    tiles: list[tuple[str, str]]


@dataclass
class Text:
    """A paragraph."""

    text: str


@dataclass
class Table:
    """Rows of cells; the first column is text, the others are numbers unless ``words``."""

    head: list[str]
    rows: list[list[str]]
    words: bool = False


@dataclass
class Figure:
    """A drawing as inline SVG; several in a row of a page stand side by side where there is room."""

    name: str
    title: str
    svg: str
    caption: str = ""
    wide: bool = False


@dataclass
class Picture:
    """A PNG image."""

    name: str
    png: bytes
    caption: str


@dataclass
class Node:
    """A node of a tree; ``share`` (0 .. 1) is drawn as a bar."""

    label: str
    details: str = ""
    share: float | None = None
    children: list["Node"] = field(default_factory=list)
    colour: str = ""


@dataclass
class Tree:
    """A tree of shares."""

    roots: list[Node]


@dataclass
class Samples:
    """Pictures with the text that goes with each: (PNG, task, text)."""

    name: str
    samples: list[tuple[bytes, str, str]]


@dataclass
class Commands:
    """What to try next: (what it does, the command)."""

    commands: list[tuple[str, str]]


Block = Tiles | Text | Table | Figure | Picture | Tree | Samples | Commands


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block]


@dataclass
class Page:
    """The whole report."""

    title: str
    subtitle: str
    sections: list[Section]
    footer: str
