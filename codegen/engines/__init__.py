"""What a rank launches for a site: specs, tables, kernels and their arguments together.

launch.py is an attention's kernels, transfers.py those of exchanges and credits, target.py where they are loaded and
launched; cpu_engine.py drives them in Triton's interpreter on CPU ranks, device_engine.py on a GPU. choice.py says
whether kernels or ATen run an attention, and why; trial.py has either of them alone on a device, to be timed.

May import: the leaves, runtime/program, runtime/wires, runtime/rank, codegen/schedule, codegen/rows, codegen/kernels
and codegen/toolchain.
"""
