"""A contact sheet: some scenes with their captions and questions."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megatron_ext.picture_world.captions import caption
from megatron_ext.picture_world.questions import questions
from megatron_ext.picture_world.render import render
from megatron_ext.picture_world.world import RICHEST, World, make_scene

COLUMNS, CELL, PICTURE, LINE = 4, (300, 330), 180, 13


def write_sheet(file: Path, split: str, seed: int, size: int, world: World = RICHEST, count: int = 12) -> None:
    """The first ``count`` scenes of a split, rendered at ``size`` pixels and shown enlarged."""
    rows = -(-count // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL[0], rows * CELL[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for index in range(count):
        scene = make_scene(seed, split, index, world)
        x, y = index % COLUMNS * CELL[0] + 10, index // COLUMNS * CELL[1] + 10
        sheet.paste(render(scene, size).resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (x, y))
        lines = textwrap.wrap(caption(scene), 48)
        lines += [f"{q.text} {q.answer}" for q in questions(scene, 3)]
        for number, line in enumerate(lines[:10]):
            draw.text((x, y + PICTURE + 6 + number * LINE), line, fill="black", font=font)
    sheet.save(file)
