"""What one communication site does on every rank: one frozen object, written once for all ranks.

Start in schedule.py (the object) and mesh.py (ranks as offsets). builders.py names every way to build one: torus.py is
Torus Attention, usp.py and allgather.py are its peers, gather.py and reshard.py move shards outside attention;
chunk_flow.py is the dataflow that the attention builders share. The object is proved by codegen/proof, priced by
codegen/plan, run by runtime/rank and turned into kernels by codegen/engines: there is no second description.

May import: the leaves and runtime/program/.
"""
