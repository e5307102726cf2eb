"""Compiled models as files: the writer and the reader of the package format, side by side.

Start in export.py (`sfcompile.export`) and load.py (`sfcompile.load`). file.py is the container and its hashes;
graph.py, tensors.py, schedules.py and call.py each write and read one of its parts. A package holds data, no pickle and
no code.

May import: the leaves, runtime/, codegen/, passes/, sfcompile/capture/ and sfcompile/lowering/.
"""
