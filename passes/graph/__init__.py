"""The vocabulary of the passes: what a value of a graph is, seen as tokens and shards.

Start in layout.py: which rank owns which token (Ownership), how a value is cut (Layout, Window), what was chosen for an
op (OpLayouts). labels.py names token positions, op_view.py reads one call, cost.py counts its FLOPs and bytes,
attention_site.py reads an attention as a site, local_graph.py writes one rank's graph, halo.py sends rows with what
ranks tell each other, lifetimes.py holds what puts read, stages.py reads the graph as a step.

May import: the leaves, runtime/program and runtime/rank. Knows no op by its meaning: that is passes/rules.
"""
