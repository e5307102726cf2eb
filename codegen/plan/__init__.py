"""What a schedule costs, and the search for the cheapest.

simulator.py plays a schedule on a topology, volumes.py knows the bytes in closed form, choose_plan.py enumerates
meshes, schedules and chunkings, and keeps every price with its reason.

May import: the leaves, runtime/program/, codegen/schedule/ and codegen/proof/.
"""
