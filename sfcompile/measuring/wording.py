"""The constants of a job's machines for people: as a table, and in a line."""

from __future__ import annotations

from sfcompile.runtime.program.topology import Topology


def table(topology: Topology) -> str:
    """The constants for people."""
    rows = [
        ("matmul", f"{topology.flops_per_s / 1e9:.1f} GFLOP/s a rank"),
        ("attention", f"{(topology.attention_flops_per_s or topology.flops_per_s) / 1e9:.1f} GFLOP/s a rank"),
        (
            "pointwise",
            f"{topology.memory_bytes_per_s / 1e9:.2f} GB/s; a call starts in {topology.launch_s * 1e6:.0f} us",
        ),
        ("put", f"{topology.message_s * 1e6:.0f} us and {(topology.copy_bytes_per_s or 0) / 1e9:.2f} GB/s of copying"),
        ("inside", f"{topology.local_latency_s * 1e6:.0f} us until a chunk is seen"),
    ]
    if topology.num_machines > 1:
        link = f"{topology.network_bytes_per_s * 8 / 1e6:.0f} Mbit/s a machine"
        touch = topology.touch_bytes_per_s
        lost = f"its bytes cost compute a second per {touch / 1e6:.0f} MB" if touch else "its bytes cost no compute"
        rows.append(("between", f"{link}, {topology.network_latency_s * 1e6:.0f} us; {lost}"))
    head = f"{topology.num_ranks} ranks on {topology.num_machines} machine{'s' * (topology.num_machines > 1)}"
    return "\n".join([head, *(f"  {name:<10} {text}" for name, text in rows)])


def in_a_line(topology: Topology, spread: float | None = None) -> str:
    """The constants that plans depend on most.

    Args:
        spread: how far the rate between machines may be off, as a part of it; None: nothing is known of that.
    """
    parts = []
    if topology.num_machines > 1:
        off = "" if spread is None else f" (+-{max(spread, 0.01):.0%})"
        rate = _bits(topology.network_bytes_per_s * topology.nics_per_machine)
        parts.append(f"{rate} a machine{off}, {topology.network_latency_s * 1e3:.2g} ms")
    if topology.num_ranks > topology.num_machines:
        inside = f"{topology.local_bytes_per_s / 1e9:.3g} GB/s, {topology.local_latency_s * 1e6:.2g} us"
        parts.append(f"inside a machine {inside}")
    attention = topology.attention_flops_per_s or topology.flops_per_s
    rates = [f"{_flops(topology.flops_per_s)} of matmul", f"{_flops(attention)} of attention"]
    parts.append(f"compute {', '.join(rates)}, {topology.memory_bytes_per_s / 1e9:.3g} GB/s of pointwise ops a rank")
    return "; ".join(parts)


def _bits(bytes_per_s: float) -> str:
    bits = 8.0 * bytes_per_s
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
