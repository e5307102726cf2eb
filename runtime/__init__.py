"""Runtime: one rank's life while the compiled graph runs.

    program/   the language at the bottom: sites, instructions, topology
    wires/     how chunks travel between CPU ranks
    rank/      the session, the calls under way, the custom ops
    gpu/       one door for GPU ranks

Start in rank/session.py. May import: the leaves.
"""
