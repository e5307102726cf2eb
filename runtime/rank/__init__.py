"""One rank's life: the session, the calls under way, and the custom ops that reach them from a graph.

Start in session.py. sides.py says what it asks of the place where sites run; cpu_side.py is that place on CPUs,
runtime/gpu/ has the other. site_call.py is what a call of a site is given, executor.py runs it step by step
(attention_aten.py computes, attention_library.py on GPUs; partials.py adds up), engine.py is what a kernel engine must
offer; ops.py registers torch.ops.streamfusion, library_calls.py adds functions of libraries; fit.py compares what
phases are given with the schedule; recorder.py takes times; calls.py tells a program's calls apart; forks.py is what a
process has that was forked from a rank.

process_group.py is the job, or the group of ranks, that a rank belongs to. meetings.py is how its ranks agree, over
the job's store (job_store.py: with which limits; values.py: in which words); presence.py knows who has gone.

May import: the leaves, runtime/program and runtime/wires.
"""
