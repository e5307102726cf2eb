"""The small compiler of computing puts: norm, rotary embedding and casts of the rows that a kernel sends.

indices.py is the algebra of indices, rows.py the program of one row and its text in Triton, row_ops.py what each ATen
op means in it. passes/fuse_puts.py finds the programs, codegen/kernels/moves.py sends what they make.

May import: the leaves.
"""
