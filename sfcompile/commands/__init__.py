"""The command line: `sfcompile demo | doctor | explain | simulate | export | run | kernels | completion`.

Start in cli.py: it knows the commands, each file holds one or a family. launch.py starts ranks, meta_model.py builds a
model without its weights, measure.py writes a topology file, progress_bar.py shows long work. No compile needs this
room.

May import: the leaves, runtime/program, runtime/rank, runtime/gpu, codegen/schedule, codegen/plan,
codegen/toolchain, codegen/engines, passes/report, sfcompile/measuring, sfcompile/prediction and sfcompile/package.
"""
