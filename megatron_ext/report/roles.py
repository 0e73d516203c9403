"""The picture of a plan: what every class of token does in every layer."""

from megatron_ext.routing.plan import CLASSES, Plan, Role
from megatron_ext.token_classes import Task

MEANING = {
    Role.FULL: "full: attends, is attended to, goes through the FFN",
    Role.KV_ONLY: "key and value only: is attended to, passes unchanged",
    Role.SKIP: "skip: passes by the layer",
}
_CSS = {Role.FULL: "full", Role.KV_ONLY: "kv", Role.SKIP: "skip"}
_WIDTH, _NAMES, _ROW, _TOP = 860, 172, 30, 8


def picture(plan: Plan, tasks: set[Task]) -> str:
    """An SVG with a row per class of token of ``tasks`` and a column per layer."""
    rows = [(t, m) for t, m in CLASSES if t in tasks]
    cell = (_WIDTH - _NAMES) / plan.num_layers
    gap = 2 if cell > 8 else 0.5
    height = _TOP + _ROW * len(rows) + 54
    parts = [
        f'<svg class="roles" viewBox="0 0 {_WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'aria-label="role of each class of token in each of {plan.num_layers} layers">'
    ]
    for i, (task, modality) in enumerate(rows):
        y = _TOP + i * _ROW
        name = f"{task.name.lower()}, {modality.name.lower()}" if task != Task.TEXT else "text"
        parts.append(f'<text class="tick" x="{_NAMES - 12}" y="{y + 18}" text-anchor="end">{name}</text>')
        for layer in range(plan.num_layers):
            role = plan.role(layer, task, modality)
            parts.append(
                f'<rect class="role {_CSS[role]} {task.name.lower()}" x="{_NAMES + layer * cell + gap / 2:.1f}" '
                f'y="{y}" width="{cell - gap:.1f}" height="{_ROW - 4}" rx="2">'
                f"<title>layer {layer}, {name}\n{MEANING[role]}</title></rect>"
            )
    below = _TOP + _ROW * len(rows) + 14
    every = next(n for n in (1, 2, 4, 5, 8, 10, 20, 50) if n * cell >= 18)
    for layer in range(0, plan.num_layers, every):
        x = _NAMES + (layer + 0.5) * cell
        parts.append(f'<text class="tick" x="{x:.1f}" y="{below}" text-anchor="middle">{layer}</text>')
    parts.append(f'<text class="label" x="{_NAMES - 12}" y="{below}" text-anchor="end">layer</text>')
    x = _NAMES
    for role in (r for r in Role if r in used_roles(plan, tasks)):
        parts.append(f'<rect class="role {_CSS[role]} ink" x="{x}" y="{below + 16}" width="14" height="14" rx="2"/>')
        parts.append(f'<text class="tick" x="{x + 20}" y="{below + 27}">{MEANING[role].split(":")[0]}</text>')
        x += 40 + 7 * len(MEANING[role].split(":")[0])
    return "".join(parts) + "</svg>"


def used_roles(plan: Plan, tasks: set[Task]) -> set[Role]:
    """The roles that tokens of ``tasks`` have somewhere."""
    return {plan.role(layer, t, m) for layer in range(plan.num_layers) for t, m in CLASSES if t in tasks}
