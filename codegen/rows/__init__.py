"""The small compiler of computing puts: norm, rotary embedding and casts of the rows that a kernel sends.

elements.py is dtypes and blocks, indices.py the algebra of indices, rows.py the program of one row and its text in
Triton. op_table.py is the table of ATen ops, row_views.py and row_math.py say what each means in a row, and row_ops.py
compiles a stretch of a graph. passes/fuse_puts.py finds the stretches, codegen/kernels/moves.py sends what they make.

May import: the leaves.
"""
