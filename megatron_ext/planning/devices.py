"""Devices that a plan may be made for: throughput, memory, links.

Dense bf16 peaks are those of :mod:`megatron_ext.training.devices`; memory and links are from NVIDIA's data sheets, per
GPU and direction. A product of n rows reaches ``peak * efficiency * n / (n + half_rows)``.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.training.devices import peak_flops

GB = 1e9


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        peak: FLOP/s of products in bf16 (of a CPU: float32).
        memory: bytes; 0: as much as wanted.
        bandwidth: bytes/s of its memory.
        node: devices of a node, which ``link`` connects.
        link, network: bytes/s of a device, per direction, inside a node and between nodes.
        link_share, network_share: share of these that messages reach.
        link_latency, network_latency: seconds of a message.
        efficiency: share of the peak that large products reach.
        half_rows: rows of a product that reaches half of that.
        attention: share of the peak that attention reaches.
        launch: seconds that a kernel takes at least.
        overhead_bytes: of the driver's context and the communication library.
        fragmentation: memory lost to fragmentation, as a share of what is used.
        usable: share of the memory that a plan may fill.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    node: int = 8
    link: float = 450 * GB
    network: float = 50 * GB
    link_share: float = 0.75
    network_share: float = 0.85
    link_latency: float = 10e-6
    network_latency: float = 20e-6
    efficiency: float = 0.75
    half_rows: float = 512.0
    attention: float = 0.6
    launch: float = 4e-6
    overhead_bytes: float = 1.5 * GB
    fragmentation: float = 0.04
    usable: float = 0.92

    @property
    def limit(self) -> float:
        """Bytes that a plan may use."""
        return self.usable * self.memory if self.memory else float("inf")


DEVICES = {
    "h100": Device("H100 SXM", peak_flops("H100"), 80 * GB, 3350 * GB),
    "h200": Device("H200", peak_flops("H200"), 141 * GB, 4800 * GB),
    "b200": Device("B200", peak_flops("B200"), 180 * GB, 7700 * GB, link=900 * GB),
    # A core of a server; --calibrate measures the present one.
    "cpu": Device(
        "CPU",
        50e9,
        0,
        10 * GB,
        link=1 * GB,
        network=1 * GB,
        link_latency=100e-6,
        network_latency=100e-6,
        half_rows=16.0,
        attention=0.3,
        launch=10e-6,
        overhead_bytes=0,
        fragmentation=0,
    ),
}


def device_of(name: str, calibration: Path | None = None) -> Device:
    """A device by its name, with what a calibration (``calibration.py``) measured.

    Raises:
        UserError: the name is unknown, or the file is not a calibration.
    """
    if name not in DEVICES:
        raise UserError(f"--device {name}: not known; one of {', '.join(DEVICES)}")
    device = DEVICES[name]
    if calibration is None:
        return device
    measured = read_json(calibration)
    known = {field.name for field in fields(Device)}
    values = measured.get("device") if isinstance(measured, dict) else None
    if not isinstance(values, dict) or not set(values) <= known:
        raise UserError(f"{calibration}: is not a calibration; tools/plan_run.py --calibrate writes one")
    return replace(device, **values)
