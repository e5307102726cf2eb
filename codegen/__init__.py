"""Code generation: sites, the schedule of one site for all ranks, its proof, its cost.

sites               what an attention or a gather asks for
mesh                ranks on a grid Ulysses x ring, and how it lies on machines
schedule            the schedule object: one program, seen by every rank from its own place
chunk_flow          the chunks, slots and puts that all attention schedules share
schedule_torus      builder: Ulysses across machines, staged and hidden under attention; ring inside
schedule_usp        builder: the same dataflow unstaged, as Ulysses, ring, USP, TAS
schedule_allgather  builder: keys and values to everyone, queries stay
schedule_gather     builder: all-gather of uneven shards
schedule_reshard    builder: every rank gets the part that it wants: halos, other cuts, another dim
builders            all of them by name
checker             proof for any number of ranks: pairs once, no lost signal, no deadlock, no reuse race
symbolic_run        the same by running every rank explicitly, with vector clocks
simulator           when every rank does what on a topology
volumes             closed forms of the bytes per kind of link
"""
