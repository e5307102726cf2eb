"""From text to a loaded kernel: module, cubin, table of facts.

loader.py makes a Triton module of a text, compiler.py compiles it for an architecture without a GPU, machine_code.py
reads the result back, listing.py and files.py show and ship it. nvshmem_bitcode.py cuts NVSHMEM's device library to
what kernels call, nvshmem_calls.py declares these calls, device_state.py fills in its state where a module is loaded;
interpreter.py runs kernels on the CPU. gpu_results.py reads what gpu-check found on a GPU.

May import: the leaves, codegen/schedule, codegen/rows and codegen/kernels.
"""
