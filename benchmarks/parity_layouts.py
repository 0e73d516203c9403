"""Parallel layouts by name, such as tp2-pp2-vp2-cp2-sp-dp2; with "uneven" stages, as in pp2-uneven, and "selective" or
"full" recomputation, as in cp2-full."""

import math
import re

UNEVEN = {2: "Et*3|t*5L", 4: "Et|t*2|t*3|t*2L"}
"""For 8 layers, by the number of chunks: what "uneven" in a name means, as in pp2-uneven and pp2-vp2-uneven."""

OTHERS = "tp1-selective tp1-full tp2-sp-full tp1-pp2-uneven tp1-pp2-vp2-uneven tp1-pp4-uneven"
CONTEXT = (
    "cp2 cp2-selective cp2-full cp4 cp4-full cp2-dp2 tp2-cp2 tp2-cp2-sp tp2-cp2-sp-selective tp2-cp2-sp-full pp2-cp2 "
    "pp2-cp2-full pp2-uneven-cp2 pp2-vp2-cp2 pp2-vp2-uneven-cp2 cp8 cp4-dp2 tp2-cp4-sp tp4-cp2 tp4-cp2-sp "
    "tp2-cp2-sp-dp2 pp4-cp2 pp2-cp4 pp2-vp2-cp2-dp2 tp2-pp2-cp2-sp tp2-pp2-vp2-cp2-sp"
)


def all_layouts() -> list[str]:
    """{TP 1, 2, 4} x {PP 1, 2, 4, virtual} x {SP on, off} x {DP 1, 2} in up to 8 processes; then recomputation and
    uneven stages; then context parallelism with each of these."""
    names = []
    for tp in (1, 2, 4):
        for pipeline in ("", "-pp2", "-pp2-vp2", "-pp4", "-pp4-vp2"):
            for sp in ("", "-sp") if tp > 1 else ("",):
                for dp in ("", "-dp2"):
                    name = f"tp{tp}{pipeline}{sp}{dp}"
                    if processes(name) <= 8:
                        names.append(name)
    return [*names, *OTHERS.split(), *CONTEXT.split()]


def overrides(layout: str) -> list[str]:
    """Settings of a layout."""
    keys = {"tp": "tensor", "cp": "context", "pp": "pipeline", "vp": "virtual_pipeline"}
    sizes, letters = re.findall(r"(tp|cp|pp|vp)(\d+)", layout), layout.split("-")
    settings = [f"parallel.{keys[k]}={n}" for k, n in sizes] + ["parallel.sequence=true"] * ("sp" in letters)
    if "uneven" in letters:
        chunks = math.prod(int(size) for key, size in sizes if key in ("pp", "vp"))
        settings.append(f"parallel.layout={UNEVEN[chunks]}")
    return settings + [f"training.recompute={kind}" for kind in ("selective", "full") if kind in letters]


def processes(layout: str) -> int:
    """Number of processes of a layout."""
    total = 1
    for _, size in re.findall(r"(tp|cp|pp|dp)(\d+)", layout):
        total *= int(size)
    return total
