"""What one communication site does on every rank: one frozen object, written once for all ranks.

Start in schedule.py (the object) and mesh.py (ranks as offsets). attention.py says what the chunks of an attention are,
exchange.py those of shards that change hands outside attention, and builds their schedule. builders.py names every way
to build one: torus.py is Torus Attention, usp.py and allgather.py are its peers; chunk_flow.py is the dataflow that
they share. The object is proved by codegen/proof, priced by codegen/plan, run by runtime/rank and turned into kernels
by codegen/engines: there is no second description.

May import: the leaves and runtime/program.
"""
