"""Constants of known hardware, by the name that follows the colon in ``"4x8:a100-efa"``.

Rates are what real programs reach, not the data sheet's: matmul about 0.7 of peak in bf16, links about 0.8 of the
line. The constants of ``a100-efa`` are fitted to the StreamFusion paper's table (``sfcompile simulate --paper``); the
other GPU presets are data-sheet figures times the same efficiencies and were NOT measured by us. ``sfcompile doctor
--measure`` writes a file with the constants of the cluster at hand.
"""

from __future__ import annotations

from typing import Any

_GPU: dict[str, Any] = {
    "launch_s": 8e-6,
    "message_s": 2e-6,
    "copy_bytes_per_s": None,
    "wait_s": 1e-6,
    "pairing_s": 3e-5,
    "slowdown": 0.15,
    "two_sided_rate": 0.8,
    "pair_bytes_per_s": 5e9,
    "attention_rows": 4e3,
}

PRESETS: dict[str, dict[str, Any]] = {
    # 8 x A100 40 GB with NVSwitch, 400 Gb/s of EFA per machine behind 4 cards. Fitted, all at once: effective rates
    # and costs of the paper's software on that hardware, not of the hardware alone.
    "a100-efa": {
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
        **_GPU,
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
        **_GPU,
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
