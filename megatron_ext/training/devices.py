"""Peak throughput of devices, the reference for the MFU (model FLOPs utilisation).

Dense bfloat16 tensor-core peaks, TFLOP/s, from NVIDIA's data sheets (whose headline figures assume 2:4 sparsity and are
twice as high). A device that is not listed has no MFU rather than a wrong one.
"""

import re

_DENSE_BF16_TFLOPS = (
    # The first pattern that matches the device's name counts, so variants precede their family.
    (r"GB[23]00", 2500.0),
    (r"B[23]00", 2250.0),
    (r"B100", 1750.0),
    (r"(H100|H200).*NVL", 835.5),
    (r"H100.*PCIe", 756.5),
    (r"GH200|H100|H200", 989.5),
    (r"H800", 989.5),
    (r"A100|A800", 312.0),
    (r"A40", 149.7),
    (r"A30", 165.0),
    (r"A10", 125.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s, by its name from ``torch.cuda.get_device_name``; None: not known."""
    for pattern, tflops in _DENSE_BF16_TFLOPS:
        if re.search(rf"\b({pattern})\b", device_name):
            return tflops * 1e12
    return None


def model_flops_utilisation(flops: float, seconds: float, devices: int, device_name: str) -> float | None:
    """Share of the devices' peak, given the model's ``flops`` over all devices in ``seconds``.

    None: the device's peak is not known.
    """
    peak = peak_flops(device_name)
    return flops / (seconds * devices * peak) if peak else None
