"""The language at the bottom: what every other room speaks.

instructions.py is the program of one rank (put, wait, attend, push), phases.py names its phases, sites.py says what a
communication site asks for, in the runs of intervals.py; chunks.py cuts and places what an exchange moves, formats.py
says how chunks are written while they travel. topology.py holds machines and their constants
(presets.py those with a name), stages.py what a step of a graph is made of, spans.py a stretch of measured time.

May import: the leaves.
"""
