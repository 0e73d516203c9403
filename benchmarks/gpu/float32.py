"""Outputs, loss and gradients of every plan in float32, against references from a CPU."""

from gpu.records import Context, Record
from gpu.steps import Figure
from parity import LIMIT, PLANS, against_references

SETTINGS = ["model.num_layers=4"]
"""Small, because the references are carried from machine to machine."""

FIGURES = {
    "float32": {
        name: Figure(f"{what}, largest relative error of all plans", at_most=LIMIT, everywhere=True)
        for name, what in {
            "logits": "logits",
            "loss": "loss",
            "gradient": "gradient of a parameter",
            "later_losses": "loss after an optimizer step",
        }.items()
    }
}


def measure(context: Context, record: Record) -> None:
    """Measure the errors; on a CPU missing references are computed."""
    results = against_references("tp1", list(PLANS), SETTINGS, context.references)
    lines = [f"| plan | {' | '.join(FIGURES['float32'])} |", "| --- | --- | --- | --- | --- |"]
    for plan, errors in results.items():
        lines.append(f"| {plan} | {' | '.join(f'{errors[name]:.0e}' for name in FIGURES['float32'])} |")
    record.tables["Relative errors"] = "\n".join(lines)
    for name in FIGURES["float32"]:
        record.figures[name] = max(errors[name] for errors in results.values())
