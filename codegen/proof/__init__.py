"""Why a schedule cannot deadlock, race or lose a signal, on any number of ranks.

checker.py proves a schedule from the program of one rank, by symmetry; its head says what is proved and why that is
enough. Tests hold it against a run of all ranks with vector clocks (tests/support/symbolic_run.py). To prove a schedule
of your own: check() is the door.

May import: the leaves, runtime/program and codegen/schedule.
"""
