"""Writes the fused attention kernel for Hopper: a warp of its own fetches tiles, two warpgroups attend.

The same walk over units and tiles as attend.py, in half precision. It is Gluon, the part of Triton
in which layouts, barriers and warps are said by hand: Triton's own pipeliner waits for each product at once, and drains
between chunks.

    producer, 1 warp      polls, tables ->  K [stage]  V [stage]   ring of STAGES tiles, by tensor copies (TMA)
                                              |  full    ^  empty  (mbarriers)
    consumer 0, 4 warps   rows 0..63   of a tile   S = QK^T of this block | softmax under PV of the block before
    consumer 1, 4 warps   rows 64..127 of a tile   the same, at a pace of its own
    masker, 1 warp        with a mask of keys: what is added to the scores of a block (attend_tma_masks.py)

The loop over blocks goes through all chunks of a unit: nothing drains between them, and the producer is up to STAGES
blocks ahead, in the next tile or unit too. Only the producer polls for keys, and only on the program's first tile of a
unit. As in FlashAttention-3 (arXiv 2407.08608) the scores of a block are computed while the values of the block before
are being summed, and that sum goes on under the softmax.

**Order.** Tensor copies read by the async proxy, what peers stored was stored by the generic one. Happens-before
alone does not order accesses of two proxies (PTX memory model, proxy-preserved causality): a proxy fence must lie on
the way. The way is

    peer's stores -> its release -> acquire of the poll, by a lane of the producer -> warp barrier
                  -> fence.proxy.async.global, by every lane -> the copy, by one lane of the same warp

What came by NVSHMEM lies in this rank's heap and goes the same way: its signal is raised behind its data, and the
acquire orders what a network card wrote as it does for loads of the generic proxy (device.py); from there on the fence
makes it as visible to copies.

So the fence stands after the acquire and in the thread that copies, and covers later copies of this program too: they
follow in its program order, of a chunk whose signal it has seen. A fence for shared memory only would not do. The other
way round, a bank is overwritten after the credit; the credit follows the kernel, the kernel its consumers, and they
waited for the barrier that every copy completes.

Outputs go home as attend_tma_outputs.py says. What leaves by NVSHMEM, and chunks that are passed on, leave from
programs that do not attend, before their warps part.

A last block that a chunk does not fill begins earlier, so that it ends with the chunk; keys that were attended to
already are masked. Nothing beyond a chunk is read: it may be in flight, and NaN times a weight of 0 is NaN.
"""

from __future__ import annotations

from sfcompile.codegen.kernels.attend_tma_masks import (
    MASK_RING,
    add_mask,
    hide_later_keys,
    mask_block,
    masker_arguments,
    seen_columns,
    to_chunk,
)
from sfcompile.codegen.kernels.attend_tma_outputs import again, push, send_outputs
from sfcompile.codegen.kernels.reach import KernelText
from sfcompile.codegen.kernels.spec import INTEGERS, LN2, LOG2E, KernelSpec, attend_arguments
from sfcompile.codegen.kernels.tables import FORWARD, KEY, QUERY, UNIT
from sfcompile.codegen.kernels.text import columns, entry_name, heap_of, line_of, module, prologue, wrapped
from sfcompile.runtime.wires.symmetric_heap import PLACE

_RING = ("k_tiles", "v_tiles", "k_full", "k_empty", "v_full", "v_empty")
_TABLES = ("units_ptr", "queries_ptr", "keys_ptr", "place_ptr")
_SHARE = ("num_units", "batch", "heads", "first_head", "me", "workers")
_CAUSAL = ("q_positions_ptr", "k_positions_ptr")
CONSUMERS = 2
"""Warpgroups that attend, each to block_m / 2 rows of a tile."""
REGISTERS = (232, 40)
"""Of a thread that attends, of one that copies."""


def attend_tma_source(spec: KernelSpec) -> str:
    """The module that holds the kernel ``attend``: text for Triton 3.9, with the arguments of attend.py's."""
    out = KernelText(spec.reach, group="warp")
    _producer(out, spec)
    out("", "")
    _consumer(out, spec)
    out("", "")
    if spec.mask != "none":
        _masker(out, spec)
        out("", "")
    out(wrapped("@gluon.jit(do_not_specialize=[", [f'"{name}"' for name in INTEGERS], "])"))
    with out.block(wrapped(f"def {entry_name('attend', spec.reach)}(", attend_arguments(spec), "):")):
        _kernel(out, spec)
    constants = [
        f"BM = gl.constexpr({spec.block_m})",
        f"ROWS = gl.constexpr({spec.block_m // CONSUMERS})",
        f"BN = gl.constexpr({spec.block_n})",
        f"D = gl.constexpr({spec.head_dim})",
        f"STAGES = gl.constexpr({spec.stages})",
        f"STATE = gl.constexpr({spec.state_words})  # words of a query's softmax state",
        f"COPY_PROGRAMS = gl.constexpr({spec.copy_programs if spec.forwards else 0})",
        f"QK_SCALE = gl.constexpr({spec.scale * LOG2E!r})  # scale * log2(e): scores in powers of two",
    ]
    if spec.mask != "none":
        constants += [f"MASK_SCALE = gl.constexpr({1 / spec.scale!r})  # added before scores are scaled"]
    title = f"Attention of {spec.dtype} queries against chunks as they arrive, head size {spec.head_dim}, for sm_90."
    return module(title, "\n".join(constants) + "\n\n\n" + out.text)


def _kernel(out: KernelText, spec: KernelSpec) -> None:
    """The kernel itself: passes chunks on, or sets up the ring and lets its warps go."""
    out("program = gl.program_id(0)", "programs = gl.num_programs(0)", *prologue())
    out.stop_if_broken("num_units", *(["num_forwards"] if spec.forwards else []))
    if spec.forwards:
        with out.block("if program < COPY_PROGRAMS:"):
            _forward(out)
            out("num_units = 0  # this program does not attend")
    if spec.senders:
        with out.block("if program == COPY_PROGRAMS:"):
            send_outputs(out, spec, CONSUMERS)
            out("num_units = 0  # nor does this one")
    aside = " - COPY_PROGRAMS" + (" - 1" if spec.senders else "")
    out(
        f"me = program{aside}",
        f"workers = programs{aside}",
        "TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)",
        f"bank_rows = gl.load(place_ptr + {PLACE.index('bank_bytes')}) // (2 * D)",
        f"rows_ptr = gl.multiple_of(bank.to(gl.pointer_type({spec.element})), 16)",
        "bank_desc = tma.make_tensor_descriptor(rows_ptr, [bank_rows.to(gl.int32), D], [D, 1], [BN, D], TILE)",
        *(f"q_tile_{i} = gl.allocate_shared_memory({spec.element}, [ROWS, D], TILE)" for i in range(CONSUMERS)),
        *(f"{x}_tiles = gl.allocate_shared_memory({spec.element}, [STAGES, BN, D], TILE)" for x in "kv"),
        *(f"{name} = mbarrier.allocate_mbarrier(batch=STAGES)" for name in _RING[2:]),
    )
    if spec.mask != "none":
        out(
            "ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])",
            "biases = gl.allocate_shared_memory(gl.float32, [STAGES, BN], ROW)",
            "masked = gl.allocate_shared_memory(gl.int32, [STAGES, 1], ROW)",
        )
    fillers = {"k_full": 1 if spec.mask == "none" else 2}  # of a block's keys: tile and mask
    with out.block("for i in gl.static_range(STAGES):"):
        for name in _RING[2:]:
            out(f"mbarrier.init({name}.index(i), count={CONSUMERS if 'empty' in name else fillers.get(name, 1)})")
    with out.block("gl.warp_specialize(["):
        for i in range(CONSUMERS):
            passed = ", ".join([f"gl.constexpr({i})", f"q_tile_{i}", *_consumer_arguments(spec)])
            out(f"(consumer, ({passed})),")
        out(f"(producer, ({', '.join(_producer_arguments(spec))})),")
        if spec.mask != "none":
            out(f"(masker, ({', '.join(masker_arguments(spec))})),")
    single = 1 if spec.mask == "none" else 2  # warps for themselves: room for four is taken anyway
    workers = [*(str(4) for _ in range(CONSUMERS - 1)), *["1"] * single]
    registers = [*(str(REGISTERS[0]) for _ in range(CONSUMERS - 1)), *[str(REGISTERS[1])] * single]
    out(f"], [{', '.join(workers)}], [{', '.join(registers)}])")


def _producer_arguments(spec: KernelSpec) -> list[str]:
    names = ["bank_desc", *_RING, *_TABLES, *_SHARE, "kv_heads", "first_kv", "signals", "epoch"]
    return names + (["spans_ptr"] if spec.causal else [])


def _consumer_arguments(spec: KernelSpec) -> list[str]:
    """After the number and the tile of queries. What is seldom needed is no argument, which would be a register."""
    names = [*_RING, *_TABLES, *_SHARE, "bank", "heaps_ptr", "rank", "out_ptr", "out_sb", "out_sh", "out_sr"]
    names += [*_CAUSAL, "spans_ptr"] if spec.causal else []
    names += list(MASK_RING) if spec.mask != "none" else []
    names += ["counters_ptr"] if spec.pushes else []
    names += ["state_ptr"] if spec.carry else []
    return names + (["lse_ptr", "own_rows"] if spec.lse else [])


def _forward(out: KernelText) -> None:
    """A program that passes chunks on: as attend.py's copy programs."""
    out("hop = program")
    with out.block("while hop < num_forwards:"):
        out(f"forward = forwards_ptr + hop * {len(FORWARD)}")
        out.read("forward", FORWARD)
        with out.block("if slot >= 0:"):
            out.wait("slot")
        signal_at = f"signals_at + {line_of('to_slot')}"
        near = [
            f"to = {heap_of('dst')}",
            "copy_chunk(to + bank_at + to_at, bank + at, (nbytes + 3) // 4)",
            "gl.barrier()  # every thread's stores happen before thread 0's release",
            f"raise_signal(to + {signal_at}, signal)",
        ]
        with out.block("if unbroken(place_ptr) != 0:"):
            out.fork(near, out.put_signal("bank + at", "to_at", signal_at))
        out("hop += COPY_PROGRAMS")


def _units(out: KernelText, spec: KernelSpec, unit: list[str], query: dict[str, str]) -> None:
    """Lines at the head of the loop over units."""
    out(f"unit = units_ptr + u * {len(UNIT)}", f"query = queries_ptr + tl.load(unit) * {len(QUERY)}")
    out(*columns("unit", UNIT, {name: name for name in unit}, small=True))
    out(*columns("query", QUERY, query, small=True))
    out(
        "blocks = (rows + BM - 1) // BM",
        "tiles = blocks * batch * heads",
        "start = (me + workers - first_tile % workers) % workers  # the same program in every unit",
    )


def _producer(out: KernelText, spec: KernelSpec) -> None:
    """One warp: fills the ring, tile by tile, chunk by chunk, block by block."""
    out("@gluon.jit")
    with out.block(wrapped("def producer(", _producer_arguments(spec), "):")):
        out("n = 0", "u = 0")
        with out.block("while u < num_units:"):
            _units(out, spec, ["first_key", "last_key"], {"rows": "rows", "first_tile": "first_tile"})
            out("tile = start")
            with out.block("while tile < tiles:"):
                out("bh = tile // blocks")
                if spec.group > 1:
                    out("b = bh // heads", "h = first_head + bh % heads")
                out(f"kv_bh = b * kv_heads + h // {spec.group} - first_kv" if spec.group > 1 else "kv_bh = bh")
                out("j = first_key")
                with out.block("while j < last_key:"):
                    out(f"key = keys_ptr + j * {len(KEY)}")
                    with out.block("if tile == start:"):
                        out(*columns("key", KEY, {"k_slot": "k_slot", "v_slot": "v_slot"}))
                        for slot in ("k_slot", "v_slot"):
                            with out.block(f"if {slot} >= 0:"):
                                out.wait(slot)
                        out("fence_async()  # what a peer's threads stored is read by copies: see the module's head")
                    out(*columns("key", KEY, {"columns": "rows", "pitch": "pitch"}, small=True))
                    if spec.causal:
                        out(*seen_columns())
                    for x in "kv":
                        out(
                            f"{x}_row = (tl.load(key + {KEY.index(f'{x}_at')}) // (2 * D)).to(gl.int32) + kv_bh * pitch"
                        )
                    _copies(out, spec)
                    out("j += 1")
                out("tile += workers")
            out("u += 1")


def _copies(out: KernelText, spec: KernelSpec) -> None:
    """The blocks of a chunk, each as soon as its place in the ring is free."""
    out("at = 0")
    with out.block(f"while at < {'seen' if spec.causal else 'columns'}:"):
        out("row = gl.minimum(at, columns - BN)", "stage = n % STAGES", "parity = ((n // STAGES) & 1) ^ 1")
        for x in "kv":
            out(
                f"mbarrier.wait({x}_empty.index(stage), parity)",
                f"mbarrier.expect({x}_full.index(stage), BN * D * 2)",
                f"tma.async_load(bank_desc, [{x}_row + row, 0], {x}_full.index(stage), {x}_tiles.index(stage))",
            )
        out("n += 1", "at += BN")


def _masker(out: KernelText, spec: KernelSpec) -> None:
    """One warp: the mask of each block that the producer fetches, in the same order."""
    out("@gluon.jit")
    with out.block(wrapped("def masker(", masker_arguments(spec), "):")):
        out("KEYS: gl.constexpr = gl.BlockedLayout([BN // 32], [32], [1], [0])", "col = gl.arange(0, BN, KEYS)")
        out("n = 0", "u = 0")
        with out.block("while u < num_units:"):
            _units(out, spec, ["first_key", "last_key"], {"rows": "rows", "first_tile": "first_tile"})
            out("tile = start")
            with out.block("while tile < tiles:"):
                out("mask_row = mask_ptr + (tile // blocks // heads).to(gl.int64) * mask_sb", "j = first_key")
                with out.block("while j < last_key:"):
                    out(f"key = keys_ptr + j * {len(KEY)}")
                    out(*columns("key", KEY, {"columns": "rows", "position": "position"}, small=True))
                    if spec.causal:
                        out(*seen_columns())
                    out("at = 0")
                    with out.block(f"while at < {'seen' if spec.causal else 'columns'}:"):
                        mask_block(out, spec)
                    out("j += 1")
                out("tile += workers")
            out("u += 1")


def _consumer(out: KernelText, spec: KernelSpec) -> None:
    """Four warps: ROWS queries of each tile against the ring."""
    out("@gluon.jit")
    arguments = ["which: gl.constexpr", "q_tile", *_consumer_arguments(spec)]
    with out.block(wrapped("def consumer(", arguments, "):")):
        out(
            "QK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])",
            "PV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])",
            "WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])  # two rows a thread",
            "wide_row = which * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))",
            "wide_col = gl.arange(0, D, gl.SliceLayout(0, WIDE))",
        )
        out("n = 0", "u = 0")
        with out.block("while u < num_units:"):
            query = {name: name for name in ("rows", "pitch", "first_tile")}
            _units(out, spec, ["first_key", "last_key", "done", *(["fresh"] if spec.carry else [])], query)
            out(*columns("query", QUERY, {"q_slot": "slot", "q_at": "at"}), "tile = start")
            with out.block("if (q_slot >= 0) & (tile < tiles):"):
                out(*again())
                out.wait("q_slot")
            with out.block("while tile < tiles:"):
                _tile(out, spec)
                out("tile += workers")
            out("u += 1")


def _tile(out: KernelText, spec: KernelSpec) -> None:
    """Half a tile of queries against a unit's keys."""
    out(
        "bh = tile // blocks",
        "row = (tile % blocks) * BM + wide_row",
        f"q_ptr = gl.multiple_of((bank + q_at).to(gl.pointer_type({spec.element})), 16)",
        "q_ptr += (bh * pitch).to(gl.int64) * D",
        "q = gl.load(q_ptr + row[:, None] * D + wide_col[None, :], mask=(row < rows)[:, None], other=0.0)",
        "q_tile.store(q)",
        "fence_async_shared()  # stored by threads, read by the tensor cores",
        "gl.barrier()",
        'm = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, QK))',
        "l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, QK))",
        "acc = gl.zeros([ROWS, D], gl.float32, PV)",
    )
    if spec.carry:
        out("state = state_ptr + ((first_tile + tile).to(gl.int64) * BM + which * ROWS) * STATE")
        with out.block("if fresh == 0:"):
            out("m, l, acc = kept(m, l, acc, state)")
    out("j = first_key")
    if spec.causal:
        out(*to_chunk())
    with out.block("if j < last_key:"):
        _blocks(out, spec)
    with out.block("if done != 0:"):
        _finish(out, spec)
    if spec.carry:
        with out.block("else:"):
            out("keep(m, l, acc, state)")


def _scores(out: KernelText) -> None:
    """Begin a block's scores."""
    out("s = gl.zeros([ROWS, BN], gl.float32, QK)")
    out("s = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)")


def _blocks(out: KernelText, spec: KernelSpec) -> None:
    """All blocks of the unit's chunks: the scores of one while the values of the one before are summed."""
    rows_of = f"tl.load(keys_ptr + j * {len(KEY)} + {KEY.index('rows')}).to(gl.int32)"
    parity = "(n // STAGES) & 1"
    if not spec.causal:
        out(f"left = {rows_of}  # keys of the chunk from this block on")
    out("stage = n % STAGES", f"mbarrier.wait(k_full.index(stage), {parity})")
    _scores(out)
    out("s = warpgroup_mma_wait(0, deps=(s,))")
    _keys_read(out, spec)
    _softmax(out, spec, first=True)
    out("acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, PV))[:, None]")
    out(f"p_half = gl.convert_layout(p.to({spec.element}), gl.DotOperandLayout(0, PV, 2))")
    out("before = stage", f"before_parity = {parity}", "n += 1")
    _next(out, spec, rows_of)
    out("stage = n % STAGES", f"mbarrier.wait(k_full.index(stage), {parity}, pred=j < last_key)")
    with out.block("while j < last_key:"):
        _scores(out)
        out(
            "mbarrier.wait(v_full.index(before), before_parity)",
            "acc = warpgroup_mma(p_half, v_tiles.index(before), acc, is_async=True)",
            "s = warpgroup_mma_wait(1, deps=(s,))",
        )
        _keys_read(out, spec)
        _softmax(out, spec, first=False)
        out(
            "# Through a wait that is over: nothing above may sink below it. The one for the next keys keeps the",
            "# assembler from lifting the wait for the sum above the softmax.",
            "p, alpha, l = warpgroup_mma_wait(1, deps=(p, alpha, l))",
            "this = stage",
            f"this_parity = {parity}",
            "n += 1",
        )
        _next(out, spec, rows_of)
        out(
            "stage = n % STAGES",
            f"mbarrier.wait(k_full.index(stage), {parity}, pred=j < last_key)",
            "acc = warpgroup_mma_wait(0, deps=(acc,))",
            "mbarrier.arrive(v_empty.index(before), count=1)",
            "acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, PV))[:, None]",
            f"p_half = gl.convert_layout(p.to({spec.element}), gl.DotOperandLayout(0, PV, 2))",
            "before = this",
            "before_parity = this_parity",
        )
    out(
        "mbarrier.wait(v_full.index(before), before_parity)",
        "acc = warpgroup_mma(p_half, v_tiles.index(before), acc, is_async=True)",
        "acc = warpgroup_mma_wait(0, deps=(acc,))",
        "mbarrier.arrive(v_empty.index(before), count=1)",
    )


def _next(out: KernelText, spec: KernelSpec, rows_of: str) -> None:
    """To the next block, in this chunk or the next one."""
    out("left -= BN")
    with out.block("if left <= 0:"):
        out("j += 1")
        if spec.causal:
            out(*to_chunk())
        else:
            with out.block("if j < last_key:"):
                out(f"left = {rows_of}")


def _keys_read(out: KernelText, spec: KernelSpec) -> None:
    """A block's keys, and what the mask adds to their scores, have been read: their place in the ring is free."""
    if spec.mask != "none":
        add_mask(out)
    out("mbarrier.arrive(k_empty.index(stage), count=1)")


def _softmax(out: KernelText, spec: KernelSpec, first: bool) -> None:
    """A block's weights and the new state; a chunk has BN keys or more, so its first block is full."""
    if spec.tails != "none" and not first and spec.mask == "none":  # a mask hides it too
        with out.block("if left < BN:"):
            out("s = hide_first(s, BN - left)  # attended to in the block before")
    if spec.causal:
        hide_later_keys(out)
    out("m_new = gl.maximum(m, gl.max(s, 1) * QK_SCALE)")
    reference = "m_new"
    if spec.needs_positions:  # a query may have seen no key yet
        out('m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)')
        reference = "m_safe"
    out(
        f"alpha = gl.exp2(m - {reference})",
        f"p = gl.exp2(s * QK_SCALE - {reference}[:, None])",
        "l = l * alpha + gl.sum(p, 1)",
        "m = m_new",
    )


def _finish(out: KernelText, spec: KernelSpec) -> None:
    """A query's last unit: its output goes to the caller's tensor, or home."""
    out(
        "# The same rows, worked out anew (j is last_key): what is kept through the loop costs registers.",
        "row = ((tile + (j - last_key)) % blocks) * BM + wide_row",
        f"share = gl.convert_layout(1.0 / {'gl.where(l == 0.0, 1.0, l)' if spec.needs_positions else 'l'}, "
        "gl.SliceLayout(1, PV))",
        f"o = gl.convert_layout((acc * share[:, None]).to({spec.element}), WIDE)",
        "inside = (row < rows)[:, None]",
    )
    if not spec.pushes:
        _store_own(out, spec)
        return
    out(*columns("query", QUERY, {"dst": "dst"}))
    with out.block("if dst < 0:"):
        _store_own(out, spec)
    with out.block("else:"):
        push(out, spec, CONSUMERS)


def _store_own(out: KernelText, spec: KernelSpec) -> None:
    """This rank's own queries: into the caller's tensor, at their heads and rows."""
    out(
        "b = bh // heads",
        "h = first_head + bh % heads",
        f"first_row = tl.load(query + {QUERY.index('out_at')})",
        "own_ptr = out_ptr + b.to(gl.int64) * out_sb + h.to(gl.int64) * out_sh + first_row * out_sr",
        "own_ptr += row.to(gl.int64)[:, None] * out_sr + wide_col[None, :]",
        "gl.store(own_ptr, o, mask=inside)",
    )
    if spec.lse:
        out(
            "lse_row = (tile % blocks) * BM + which * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, QK))",
            f"lse = m * {LN2!r} + gl.log(l)",
            "gl.store(lse_ptr + bh.to(gl.int64) * own_rows + first_row + lse_row, lse, mask=lse_row < rows)",
        )
