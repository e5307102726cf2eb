"""Passes: a captured ATen graph in, one rank's graph out.

The prefix of a file is its phase and the alphabet is the order of the pipeline; ``op_rules*`` is the table
that several phases read.

    analyse_*    read the graph: attention sites, token axes, costs
    choose_*     pick one layout for every value, who owns which token, along which axis, and how every attention runs
    place_*      replicated or sharded, by minimum cut
    rewrite_*    emit this rank's graph, attention as put / attend / collect; a part of the batch first
    schedule_*   order the communication against the compute
    pipeline     the ordered list, and the runner that times, checks and dumps
"""
