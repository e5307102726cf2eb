"""A captured graph becomes this rank's callable: every pass, then Inductor or eager.

Start in rank_graph.py: `run_passes` fills the passes' State from the user's options, `compile_alike` has all ranks do
it once more where their graphs differ. compile_once.py has one rank compile for all on its machine whose graphs are
equal, once own_rows.py has taken out of them what need not differ. inner.py is what runs the graph that the passes
wrote, and the only place that calls Inductor: for each distinct block of it once (blocks.py), where repeats.py finds
that stretches repeat and regions.py that they are equal. kept_plans.py and kept_start.py spare a later start what this
one has found out.

May import: the leaves, runtime/program, runtime/rank, passes and sfcompile/capture.
"""
