"""Measure what the ranks of a job can compute and move, and write it as a topology file.

torchrun ... -m sfcompile.commands.measure --out cluster.toml       on the cluster itself
sfcompile doctor --measure --ranks 4                       on this machine
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from sfcompile.measuring.precise import measure
from sfcompile.measuring.wording import table
from sfcompile.prediction.timeline import write_text
from sfcompile.runtime.rank.process_group import ProcessWorld
from sfcompile.runtime.rank.session import close_session, get_session


def main(argv: Sequence[str] | None = None) -> int:
    """One rank's part; rank 0 writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cluster.toml"))
    args = parser.parse_args(argv)
    session = get_session(lambda: ProcessWorld("auto", 60.0))
    with session.guard(), torch.no_grad():
        first = session.rank == 0
        topology = measure(session, lambda text: print(f"  measuring {text}", flush=True) if first else None)
        if first:
            print(table(topology))
            write_text(args.out, "# measured by sfcompile doctor --measure\n" + topology.to_toml())
            print(f'wrote {args.out}: use it as options={{"topology": "{args.out}"}} or --topology {args.out}')
    close_session()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
