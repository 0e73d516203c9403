"""Seconds of the products and passes over memory that a layer consists of, on one rank of a device.

A product of n rows [n, k] x [k, m] takes 2 n k m / (peak e) with e = efficiency n / (n + half_rows), but at least as
long as its bytes take to pass memory. Rows decide: few of them leave a GPU waiting for the weights. The backward pass
has two such products, and adds the weight's gradient to a float32 buffer. Elementwise steps take the time of their
bytes.
"""

from dataclasses import dataclass

from megatron_ext.config import ModelConfig
from megatron_ext.planning.devices import Device
from megatron_ext.planning.workload import of_role
from megatron_ext.routing.flops import Counts, key_width, low_rank_modules, projection_shapes, query_width
from megatron_ext.routing.image_code_costs import depth_head_multiply_adds, projector_multiply_adds
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role, task_and_modality


@dataclass(frozen=True)
class Seconds:
    """Seconds of a forward and of a backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Kernels:
    """The kernels of a model on a device.

    Attributes:
        tensor: tensor-parallel ranks, which share the matrices.
        ranks: ranks that share the rows between matrices (sequence parallelism), or 1.
        element_size: bytes of an element.
    """

    device: Device
    model: ModelConfig
    tensor: int
    ranks: int
    element_size: int

    def product(self, rows: float, inputs: float, outputs: float) -> Seconds:
        """``rows`` times a matrix, and in the backward pass the gradients of both."""
        if not rows:
            return Seconds()
        device = self.device
        rate = device.peak * device.efficiency * rows / (rows + device.half_rows)
        arithmetic = 2 * rows * inputs * outputs / rate
        moved = self.element_size * (rows * inputs + inputs * outputs + rows * outputs) / device.bandwidth
        added = 8 * inputs * outputs / device.bandwidth  # the gradient buffer, read and written
        forward = max(arithmetic, moved) + device.launch
        return Seconds(forward, 2 * forward + added)

    def passes(self, elements: float, kernels: int) -> Seconds:
        """Elementwise kernels that read and write so many elements in all; the backward pass twice as many."""
        seconds = self.element_size * elements / self.device.bandwidth + kernels * self.device.launch
        return Seconds(seconds, 2 * seconds)

    def attention(self, pairs: float) -> Seconds:
        """Attention over so many (query, key) pairs."""
        device = self.device
        if not pairs:
            return Seconds()
        forward = 4 * query_width(self.model) / self.tensor * pairs / (device.peak * device.attention) + device.launch
        return Seconds(forward, 2.5 * forward)

    def layer(self, plan: Plan, counts: Counts, layer: int) -> tuple[Seconds, Seconds]:
        """A layer over counted tokens, and the core of its attention alone."""
        model, roles, tensor = self.model, plan.roles[layer], self.tensor
        full, kv_only = (of_role(counts, roles, role) for role in (Role.FULL, Role.KV_ONLY))
        attention = self.attention(sum(counts.visible[layer]))
        total = attention
        for module, (inputs, outputs) in projection_shapes(model).items():
            for size in self._groups(plan, counts, roles, module, Role.FULL).values():
                total += self.product(size, *self._share(module, inputs, outputs))
            if module == "qkv":
                for size in self._groups(plan, counts, roles, module, Role.KV_ONLY).values():
                    total += self.product(size, inputs, 2 * key_width(model) / tensor)
            if (
                plan.projections.kind == "delta"
                and plan.projections.rank is None
                and module in plan.projections.modules
            ):
                sums = len(plan.projections.components) * 3 * inputs * outputs / tensor
                total += self.passes(sums, len(plan.projections.components))
        for index, (n, role) in enumerate(zip(counts.tokens, roles)):
            for module in low_rank_modules(plan.projections, index, role):
                inputs, outputs = self._share(module, *projection_shapes(model)[module])
                rank = plan.projections.rank
                total += self.product(n, inputs, rank / tensor) + self.product(n, rank, outputs)
        if full:
            per_row = 7 * model.hidden_size / self.ranks + 4 * model.ffn_hidden_size / tensor
            total += self.passes(full * per_row + kv_only * 4 * key_width(model) / tensor, 6)
        return total, attention

    def first(self, counts: Counts) -> Seconds:
        """What comes before the layers."""
        hidden = sum(counts.tokens) * self.model.hidden_size
        projector = counts.images / self.ranks * projector_multiply_adds(self.model)
        return self.passes(2 * hidden, 1) + self._arithmetic(projector)

    def last(self, counts: Counts, vocab_size: int) -> Seconds:
        """The output head and the loss."""
        outputs = vocab_size / self.tensor
        head = self.product(counts.logits, self.model.hidden_size, outputs)
        loss = self.passes(6 * counts.logits * outputs, 4)
        codes = counts.codes * depth_head_multiply_adds(self.model) / self.tensor
        return head + Seconds(loss.forward, loss.forward) + self._arithmetic(codes)

    def _arithmetic(self, multiply_adds: float) -> Seconds:
        forward = 2 * multiply_adds / (self.device.peak * self.device.efficiency)
        return Seconds(forward, 2 * forward)

    def _share(self, module: str, inputs: float, outputs: float) -> tuple[float, float]:
        """A matrix's sizes on a rank."""
        if module in ("qkv", "fc1"):
            return inputs, outputs / self.tensor
        return inputs / self.tensor, outputs

    def _groups(self, plan: Plan, counts: Counts, roles: tuple[Role, ...], module: str, role: Role) -> dict[int, int]:
        """Rows with ``role`` that share a matrix, by the number of its component."""
        rows = {}
        low_rank = plan.projections.rank is not None
        for index, (n, own) in enumerate(zip(counts.tokens, roles)):
            if own == role and n:
                split = module in plan.projections.modules and not low_rank
                component = plan.projections.component(*task_and_modality(index)) if split else 0
                rows[component] = rows.get(component, 0) + n
        return rows
