"""What a schedule costs, and the search for the cheapest.

simulator.py plays schedules on a topology (links.py: its ports and cards), volumes.py knows the bytes in closed form,
choose_plan.py enumerates meshes, schedules and chunkings, and keeps every price with its reason; bounds.py says which
need no simulation, doubts.py which assumed costs the choice hangs on. step.py adds layers up to a step: the one
prediction that explain, simulate, the timeline and the trace report share.

May import: the leaves, runtime/program, codegen/schedule and codegen/proof.
"""
