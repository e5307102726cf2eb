"""Code generation: sites, the schedule of one site for all ranks, and its checker.

sites               what an attention or a gather asks for
schedule            the mesh, and the schedule object: every rank's slots and instructions
schedule_torus      builder: Ulysses across machines, staged and hidden under attention; ring inside
schedule_gather     builder: all-gather of uneven shards
checker             proof over all ranks: pairs once, no lost signal, no deadlock, no reuse race
"""
