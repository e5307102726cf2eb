"""Runtime: processes, memory, wires, and the executor of schedules.

topology            which rank sits on which machine, what it computes and what the links carry; presets, files
spans               a timed stretch of a rank's work, for pictures and traces
process_group       default group under torchrun, machine discovery, agreement between ranks
instructions        what a schedule tells one rank to do
tcp_links           the connections between ranks that share no memory
symmetric_heap      one segment per rank, the same offsets everywhere, mapped by the ranks of a machine
futex               sleep until a word of shared memory changes
transport*          put, wait, release: true stores inside a machine, TCP between machines
attention_aten      flash attention that returns LSE, and the merge of partial results
executor            runs one rank's instructions
session             one per rank: topology, heap, transport, programs
ops                 torch.ops.streamfusion.*, the nodes of the graph that call the executor
"""
