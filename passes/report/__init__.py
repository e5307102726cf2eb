"""What people read of a compile: the plan as words, and the folder that `dump=` fills.

report.py holds the facts and their text, steps.py compares calls with the prediction, dump.py writes graphs after each
pass, history.py keeps the reports of this process. The pass that counts what was decided is passes/report_graph.py.

May import: the leaves and runtime/program.
"""
