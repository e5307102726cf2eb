"""A Dynamo graph becomes one functional graph of high-level ATen ops.

Start in graph.py: `capture` lowers the graph, refuses what cannot be sharded safely and keeps inputs, outputs and
writes in the caller's order. fewer_breaks.py has Dynamo break models less and library_functions.py keep functions of
libraries whole, refused.py finds what no trace can hold, attention.py recognises attention written by hand
(attention_calls.py: by libraries), expand.py unfolds ops that hide tokens, opaque.py keeps calls that no trace can
enter, autocast.py writes casts into the graph. by_sizes.py gives every set of input sizes its own program,
runtime_numbers.py keeps Python numbers inputs, aliases.py outputs views, and randomness.py knows what draws numbers.

May import: the leaves and runtime/rank.
"""
