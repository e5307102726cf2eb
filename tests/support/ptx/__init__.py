"""A machine that runs PTX on CPUs: every rank's kernels of a job, in one world, as the PTX memory model allows.

Start in world.py: GPUs, streams and launches, run in a random order. text.py reads PTX, emit.py turns straight
stretches of it into functions over numpy arrays (a lane each), launch.py holds threads, registers and shared memory of
a kernel. memory.py and clocks.py say what an access may see and whether it races; strong.py is atomics, fences and
signals, network.py NVSHMEM, tiles.py and group.py matrix products. driver.py takes the place of Triton's driver, so
that real launches come here; ranks.py runs whole sites, job.py whole sessions; mutants.py breaks kernels on purpose.
docs/gpu.md says what all this shows and what it cannot.
"""
