"""Code generation: from what one site asks for to its proof, its price and its kernels.

    schedule/    what one site does on every rank: one frozen object
    proof/       why it cannot deadlock, race or lose a signal
    plan/        what it costs, and the search for the cheapest
    rows/        the small compiler of puts that compute what they send
    kernels/     what kernel text is written
    toolchain/   text to module, cubin, table
    engines/     what a rank launches

Start in schedule/schedule.py. May import: the leaves and runtime/.
"""
