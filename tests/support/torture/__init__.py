"""Faults thrown at running jobs, and what every rank saw: never a wrong value, never a hang, nothing left behind.

A fault is one short function that every rank of a job runs (faults/), beside what is done to the job from outside. A
rank writes down each call it attempts: exact, wrong, an error of ours, or another error. The harness reads these
records when all ranks have ended and judges them by the same rules for all faults (judge.py). Start in table.py; the
whole table is ``make torture``, its quick part tests/e2e/test_torture.py.
"""
