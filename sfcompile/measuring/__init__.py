"""What the ranks of a job compute and move, measured through the runtime that models use.

Start in auto.py: it is what a compile with topology="auto" asks, once per session. quick.py measures in half a second,
precise.py (sfcompile doctor --measure) in several; both send with shifts.py, time work with compute.py and read times
with estimate.py. cache.py keeps what was measured in a file, by the machines of a job; wording.py says it to people.
attention.py times what may run the attentions of a graph on GPUs.

May import: the leaves, runtime/program, runtime/rank, runtime/wires, codegen/schedule, codegen/proof, codegen/toolchain
and codegen/engines.
"""
