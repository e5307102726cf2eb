"""Constants of known hardware, by the name that follows the colon in ``"4x8:a100-efa"``.

Two things set the pace of ranks, and they are kept apart. What a machine can do: rates of compute, memory and links,
as real programs reach them and not as the data sheet has them (matmul about 0.7 of peak in bf16, links about 0.8 of
the line). And what the software between them costs: the start of a message, of a kernel, a wait. The second is the
transport's own: measured where ranks run, else assumed (:data:`SOFTWARE`), with a range in which it is thought to lie;
the planner says where a plan would be another one inside the range (codegen/plan/doubts.py).

Nothing here was measured by us. ``a100-paper`` holds the constants, software and all, with which the simulator comes
closest to the table of the StreamFusion paper (``sfcompile simulate --paper``): no GPU of ours, and not our software.
``sfcompile doctor --measure`` writes a file with the constants of the cluster at hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Assumed(NamedTuple):
    """A constant that nobody measured: what is taken for it, and between which values it is thought to lie."""

    value: float
    low: float
    high: float


SOFTWARE: dict[str, dict[str, Assumed]] = {
    # Kernels of ours that put through NVSHMEM, one by one: a launch from a stream to one from a CUDA graph, a put from
    # the device to one through the host's proxy (EFA). What is two-sided belongs to the peers it is compared with.
    "nvshmem": {
        "launch_s": Assumed(8e-6, 3e-6, 2e-5),
        "message_s": Assumed(2e-6, 1e-6, 1.5e-5),
        "wait_s": Assumed(1e-6, 5e-7, 4e-6),
        "pairing_s": Assumed(3e-5, 1e-5, 1e-4),
        "slowdown": Assumed(0.15, 0.05, 0.4),
        "two_sided_rate": Assumed(0.8, 0.9, 0.6),
        "pair_bytes_per_s": Assumed(5e9, 2e10, 3e9),
        "attention_rows": Assumed(4e3, 2e3, 8e3),
    },
}
"""What a transport's software costs, by its name; ``low`` is the end at which it costs least."""

_NVSHMEM: dict[str, Any] = {
    "software": "nvshmem",
    "copy_bytes_per_s": None,
    **{name: assumed.value for name, assumed in SOFTWARE["nvshmem"].items()},
}

PRESETS: dict[str, dict[str, Any]] = {
    # 8 x A100 40 GB with NVSwitch (300 GB/s each way), 400 Gb/s of EFA per machine behind 4 cards.
    "a100-efa": {
        **_NVSHMEM,
        "flops_per_s": 2.2e14,
        "attention_flops_per_s": 1.9e14,
        "memory_bytes_per_s": 1.3e12,
        "local_bytes_per_s": 2.4e11,
        "local_latency_s": 2e-6,
        "network_bytes_per_s": 1e10,
        "network_latency_s": 2e-5,
        "nics_per_machine": 4,
    },
    # The same machines as the paper's table shows them. Fitted, all at once: effective rates, and costs of the paper's
    # own software.
    "a100-paper": {
        "flops_per_s": 1.93e14,
        "attention_flops_per_s": 2.3e14,
        "memory_bytes_per_s": 1.01e12,
        "local_bytes_per_s": 7.05e10,
        "local_latency_s": 3e-6,
        "network_bytes_per_s": 1.08e10,
        "network_latency_s": 1e-4,
        "nics_per_machine": 4,
        "launch_s": 6e-5,
        "message_s": 1.17e-4,
        "copy_bytes_per_s": None,
        "wait_s": 1e-6,
        "pairing_s": 1.7e-5,
        "slowdown": 0.393,
        "two_sided_rate": 0.738,
        "attention_rows": 3.71e3,
        "pair_bytes_per_s": 3.12e9,
    },
    # 8 x H100 with NVSwitch, one 400 Gb/s InfiniBand card per GPU.
    "h100-ib": {
        **_NVSHMEM,
        "flops_per_s": 6.5e14,
        "attention_flops_per_s": 5.0e14,
        "memory_bytes_per_s": 2.8e12,
        "local_bytes_per_s": 3.6e11,
        "local_latency_s": 2e-6,
        "network_bytes_per_s": 4.2e10,
        "network_latency_s": 5e-6,
        "nics_per_machine": 8,
    },
    # PCIe cards without NVLink behind one 100 Gb/s Ethernet card.
    "a10-ethernet": {
        **_NVSHMEM,
        "flops_per_s": 9e13,
        "attention_flops_per_s": 7e13,
        "memory_bytes_per_s": 5e11,
        "local_bytes_per_s": 2e10,
        "local_latency_s": 1e-5,
        "network_bytes_per_s": 1e10,
        "network_latency_s": 5e-5,
        "nics_per_machine": 1,
    },
    # One core per rank, shared memory inside a machine, 10 Gb/s Ethernet between: also what "NxM" alone means.
    "cpu": {},
}
