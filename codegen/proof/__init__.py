"""Why a schedule cannot deadlock, race or lose a signal, on any number of ranks.

checker.py proves a schedule from the program of one rank, by symmetry. symbolic_run.py runs all ranks step by step with
vector clocks; tests hold the two against each other.

May import: the leaves, runtime/program, runtime/wires and codegen/schedule.
"""
