"""What kernel text is written: Triton source from frozen specs.

spec.py says what a kernel is specialised for, tables.py what it reads at run time. attend.py writes fused attention
with puts inside, moves.py and chunks.py the kernels that only send; text.py holds the pieces they share (polls,
signals, heaps); device.py is device code that is imported as it is.

May import: the leaves, runtime/program/, codegen/schedule/ and codegen/rows/.
"""
