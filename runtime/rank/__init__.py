"""One rank's life: the session, the calls under way, and the custom ops that reach them from a graph.

Start in session.py. process_group.py is the job it belongs to; executor.py runs a site step by step, engine.py is what
a kernel engine must offer; ops.py registers torch.ops.streamfusion; recorder.py takes times.

May import: the leaves, runtime/program/ and runtime/wires/.
"""
