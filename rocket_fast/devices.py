"""What accelerators can do by their makers' data sheets: the table that the cost model reads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rocket_fast.errors import require


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator in a usual machine of its kind.

    ``bf16_flops``, ``fp32_flops``: dense peak, FLOP/s, of matrix products in bf16 with float32 sums and in float32
    without TF32. ``bandwidth``: of its memory, bytes/s. ``memory``: bytes that its driver shows. ``node_link``,
    ``network_link``: bytes/s that it can send to others in its machine and, its share of the network cards, to other
    machines, one way. ``per_node``: devices in a machine. ``kernel_seconds``: the least time from one kernel's start
    to the next one's, when each is started by Python.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    memory: float
    node_link: float
    network_link: float
    per_node: int = 8
    kernel_seconds: float = 6e-6

    def flops(self, itemsize: int) -> float:
        """Peak in numbers of 2 or 4 bytes."""
        return self.bf16_flops if itemsize == 2 else self.fp32_flops

    def link(self, count: int) -> float:
        """Bytes/s of each of ``count`` devices in rings through all: one ring for every network card of a machine."""
        return self.node_link if count <= self.per_node else min(self.node_link, self.per_node * self.network_link)


GIB = 2**30

# Data sheets of NVIDIA, in the order of the rows: "A100 Tensor Core GPU" (SXM; the 40 GB part in "A100 80GB ..."'s
# predecessor), "H100 Tensor Core GPU" (SXM5), "H200 Tensor Core GPU", "DGX B200", "L40S GPU", and the "Ada GPU
# architecture" whitepaper's appendix for the RTX 4090. Tensor core rates are the dense ones, half of what the sheets
# print with sparsity. Links in a machine: NVLink 3, 4, 5, half of the sheets' sum of both ways; PCIe 4.0 and
# (H100) 5.0 x16. Networks
# as in the DGX of that card: a 200 Gb/s card (A100) or a 400 Gb/s card (H100 on) for each; for the others one of
# 100 Gb/s for each. Memory as nvidia-smi shows it.
_TABLE = (
    # name        bf16      fp32      bytes/s   GiB    node      network
    ("a100-40", 312.0e12, 19.5e12, 1.555e12, 39.6, 300e9, 25.0e9),
    ("a100-80", 312.0e12, 19.5e12, 2.039e12, 79.6, 300e9, 25.0e9),
    ("h100", 989.4e12, 66.9e12, 3.35e12, 79.6, 450e9, 50.0e9),
    ("h100-pcie", 756.5e12, 51.2e12, 2.04e12, 79.6, 64e9, 50.0e9),
    ("h100-nvl", 835.5e12, 60.0e12, 3.94e12, 93.6, 64e9, 50.0e9),
    ("h200", 989.4e12, 66.9e12, 4.80e12, 140.4, 450e9, 50.0e9),
    ("b200", 2250.0e12, 75.0e12, 8.00e12, 179.0, 900e9, 50.0e9),
    ("l40s", 362.0e12, 91.6e12, 0.864e12, 45.0, 32e9, 12.5e9),
    ("4090", 165.2e12, 82.6e12, 1.008e12, 24.0, 32e9, 12.5e9),
)

DEVICES: dict[str, Device] = {
    name: Device(
        name=name,
        bf16_flops=bf16,
        fp32_flops=fp32,
        bandwidth=bandwidth,
        memory=gib * GIB,
        node_link=node,
        network_link=network,
    )
    for name, bf16, fp32, bandwidth, gib, node, network in _TABLE
}


def known_device(name: str) -> Device:
    """The device called ``name``; ValueError with all names where there is none."""
    require(name in DEVICES, "gpu", name, f"one of {', '.join(DEVICES)}")
    return DEVICES[name]


def card_named(name: str, memory: float) -> Device | None:
    """The device whose driver calls it ``name`` ("NVIDIA H100 80GB HBM3") and says it has so many bytes, if known."""
    words = re.split("[ -]", name.lower())
    if {"mig", "laptop", "d"} & set(words) or {"h200", "nvl"} <= set(words):  # parts of cards, and smaller ones
        return None
    if "h100" in words:
        return DEVICES[next((f"h100-{kind}" for kind in ("pcie", "nvl") if kind in words), "h100")]
    if "a100" in words:
        return DEVICES["a100-40" if memory < 60 * GIB else "a100-80"]
    return next((device for kind, device in DEVICES.items() if kind in words), None)
