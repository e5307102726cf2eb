"""How chunks travel between CPU ranks.

Start in transport.py: what put, wait and finish promise. direct.py stores into the peer's heap (symmetric_heap.py, in
memory of shared_segments.py and shared_files.py, with futex.py to sleep on), tcp.py sends between machines in the order
of the puts (over tcp_links.py, whose ranks prove in handshake.py that they are of one job), c10d.py does it with gloo.
The head of each file argues which signal makes which put visible.

May import: the leaves and runtime/program.
"""
