"""What kernel text is written: Triton source from frozen specs.

spec.py says what a kernel is specialised for, tables.py (chunk_tables.py for exchanges) what it reads at run time.
attend.py writes fused attention with puts inside, moves.py and chunks.py the kernels that only send and receive.
reach.py is how they reach other ranks (by load and store, by NVSHMEM, or both), codecs.py how they encode and decode
chunks, text.py what all texts share; device.py is the device code that goes into them as it stands.

May import: the leaves, runtime/program, runtime/wires, codegen/schedule and codegen/rows. (Of runtime/wires, the
heap's own numbers: kernels find its banks and signals by the same arithmetic.)
"""
