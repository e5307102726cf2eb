"""Passes: a captured ATen graph in, one rank's graph out.

Start in pipeline.py: the list is the compiler, in the order in which it runs. The prefix of a file is its kind:
analyse_ reads the graph, choose_ picks layouts, axes and schedules, place_ decides what is sharded, rewrite_ writes
this rank's graph, order_ and fuse_ move and merge its communication, build_ makes and proves the schedules, report_
tells. state.py is what passes hand on. graph/ is their vocabulary, rules/ how each op behaves on shards, report/ what
people read.

May import: the leaves, runtime/program, runtime/wires, runtime/rank, codegen/schedule, codegen/proof, codegen/plan,
codegen/rows, codegen/toolchain, codegen/engines, passes/graph, passes/rules and passes/report.
"""
