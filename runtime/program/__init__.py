"""The language at the bottom: what every other room speaks.

instructions.py is the program of one rank (put, wait, attend, push), sites.py what a communication site asks for,
topology.py machines and their constants (presets.py those with a name), spans.py a stretch of measured time,
stages.py what a step of a graph is made of, parts.py how a rank's tokens come in parts.

May import: the leaves.
"""
