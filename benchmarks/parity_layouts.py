"""Parallel layouts by name, such as tp2-pp2-vp2-sp-dp2."""

import math
import re

UNEVEN = {2: "Et*3|t*5L", 4: "Et|t*2|t*3|t*2L"}
"""For 8 layers, by the number of chunks: what "uneven" in a name means, as in pp2-uneven and pp2-vp2-uneven."""


def all_layouts() -> list[str]:
    """{TP 1, 2, 4} x {PP 1, 2, 4, virtual} x {SP on, off} x {DP 1, 2} in up to 8 processes."""
    names = []
    for tp in (1, 2, 4):
        for pipeline in ("", "-pp2", "-pp2-vp2", "-pp4", "-pp4-vp2"):
            for sp in ("", "-sp") if tp > 1 else ("",):
                for dp in ("", "-dp2"):
                    name = f"tp{tp}{pipeline}{sp}{dp}"
                    if processes(name) <= 8:
                        names.append(name)
    return names


def overrides(layout: str) -> list[str]:
    """Settings of a layout."""
    keys = {"tp": "tensor", "cp": "context", "pp": "pipeline", "vp": "virtual_pipeline"}
    sizes = re.findall(r"(tp|cp|pp|vp)(\d+)", layout)
    if "uneven" in layout.split("-"):
        chunks = math.prod(int(size) for key, size in sizes if key in ("pp", "vp"))
        return [*overrides(layout.replace("-uneven", "")), f"parallel.layout={UNEVEN[chunks]}"]
    return [f"parallel.{keys[k]}={n}" for k, n in sizes] + ["parallel.sequence=true"] * ("sp" in layout.split("-"))


def processes(layout: str) -> int:
    """Number of processes of a layout."""
    total = 1
    for _, size in re.findall(r"(tp|cp|pp|dp)(\d+)", layout):
        total *= int(size)
    return total
