"""One door for GPU ranks: NVSHMEM, streams, epochs that live on the device; and what carries chunks without NVSHMEM.

carriers.py picks what carries the chunks. With NVSHMEM: device_side.py is what runtime/rank/sides.py asks of the place
where sites run, device_run.py one call of one site by kernels, nvshmem.py the library's host side, transport.py puts by
its host calls. Without: message_side.py runs the executor over NCCL's messages (nccl.py makes the group),
symmetric_side.py over stores inside a machine (stores.py, in memory of symmetric.py, on a stream of streams.py).
status.py is what a GPU tells of waits in vain and of chunks of other calls; together.py takes steps that all ranks take
or none.

May import: the leaves, runtime/program, runtime/wires and runtime/rank.
"""
