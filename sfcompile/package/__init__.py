"""Compiled models as files: the writer and the reader of the package format, side by side.

Start in export.py (`sfcompile.export`; traced.py traces the model) and load.py (`sfcompile.load`, which gives a
model.py LoadedModel). file.py is the container and its hashes, disk.py the files under it; graph.py, tensors.py,
schedules.py and call.py each write and read one of its parts.

A package is data from anywhere. Before anything is built from it, limits.py bounds what it may claim and manifest.py
looks at what it says of itself; operators.py lists what its graph may call; fit.py makes every call once on tensors
without values and compares the communication with its schedules. calls.py then runs the graph, from no source.
weight_files.py (`sfcompile.load_sharded`) fills a model from safetensors files and needs no package.

May import: the leaves, runtime/program, runtime/wires, runtime/rank, codegen/schedule, codegen/proof, passes,
sfcompile/capture, sfcompile/lowering and sfcompile.
"""
