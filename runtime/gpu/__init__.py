"""One door for GPU ranks: NVSHMEM, streams, epochs that live on the device.

Start in device_side.py: what runtime/rank/sides.py asks of the place where sites run, for GPUs. device_run.py is one
call of one site by kernels, status.py what kernels tell of waits in vain and of chunks of other calls, nvshmem.py the
library's host side, transport.py puts by its host calls.

May import: the leaves, runtime/program, runtime/wires and runtime/rank.
"""
