"""Writes the fused attention kernel: many Q chunks against many K/V chunks as they arrive, outputs pushed home.

The grid is persistent. Its first programs pass chunks round the ring (they wait for peers, never for programs of their
own rank); the others attend. The tables (tables.py) list *units*, a query chunk against a run of key chunks;
every program walks all units in order and takes every ``programs``-th tile of each. A query's tiles fall to the same
program in every unit, so its softmax state passes from unit to unit without any program waiting for another of its
rank: the only waits are for peers.

The online softmax is Milakov and Gimelshein's (arXiv 1805.02867) in blocks as in FlashAttention-2 (arXiv 2307.08691):
state (m, l, acc) of a block of queries, scores in powers of two.

**Causal order.** A table says how many keys of a chunk a tile of queries sees any of (spans_of in tables.py): the loop
over blocks ends there. In the blocks before, positions are compared.

Loads of arriving data stand in the inner loop over blocks, which Triton pipelines; waits stand outside of it. A wait in
the inner loop would be overtaken by the prefetched loads of later iterations.
"""

from __future__ import annotations

from sfcompile.codegen.kernels.attend_tma import attend_tma_source
from sfcompile.codegen.kernels.attend_tma_masks import least, seen_columns
from sfcompile.codegen.kernels.codecs import loaded, pointers, stored
from sfcompile.codegen.kernels.reach import KernelText
from sfcompile.codegen.kernels.spec import INTEGERS, LN2, LOG2E, VIRTUAL_ROW, KernelSpec, attend_arguments
from sfcompile.codegen.kernels.tables import FORWARD, KEY, QUERY, UNIT
from sfcompile.codegen.kernels.text import columns, entry_name, heap_of, line_of, module, prologue, wrapped
from sfcompile.codegen.rows.elements import block_of, is_padded
from sfcompile.runtime.program.formats import SAME

_LEAST = -3e38
"""Of what is added to scores in powers of two; fp32 ends at -3.4e38."""


def attend_source(spec: KernelSpec) -> str:
    """The module that holds the kernel ``attend``: text for Triton 3.6 and later, equal for equal specs."""
    if spec.fetch == "tma":
        return attend_tma_source(spec)
    out = KernelText(spec.reach)
    out(wrapped("@triton.jit(do_not_specialize=[", [f'"{name}"' for name in INTEGERS], "])"))
    with out.block(wrapped(f"def {entry_name('attend', spec.reach)}(", attend_arguments(spec), "):")):
        out("program = tl.program_id(0)", "programs = tl.num_programs(0)")
        if spec.virtual > 1:
            _virtual(out, spec)
        out(*prologue())
        out.stop_if_broken("num_units", *(["num_forwards"] if spec.forwards else []))
        if spec.forwards:
            with out.block("if program < COPY_PROGRAMS:"):
                _forward(out)
            with out.block("else:"):
                _attend(out, spec)
        else:
            _attend(out, spec)
    constants = [
        f"BM = tl.constexpr({spec.block_m})",
        f"BN = tl.constexpr({spec.block_n})",
        f"D = tl.constexpr({spec.head_dim})",
        f"E = tl.constexpr({spec.v_head_dim})",
        f"D_BLOCK = tl.constexpr({block_of(spec.head_dim)})",
        f"E_BLOCK = tl.constexpr({block_of(spec.v_head_dim)})",
        f"COPY_PROGRAMS = tl.constexpr({spec.copy_programs if spec.forwards else 0})",
        f"QK_SCALE = tl.constexpr({spec.scale * LOG2E!r})  # scale * log2(e): scores in powers of two",
    ]
    sizes = f"head sizes {spec.head_dim} and {spec.v_head_dim}"
    title = f"Attention of {spec.dtype} queries against chunks as they arrive, {sizes}."
    return module(title, "\n".join(constants) + "\n\n\n" + out.text)


def _split_early(spec: KernelSpec) -> bool:
    """Whether batch and head are needed to attend; else only to store the output."""
    return spec.group > 1 or spec.mask != "none"


def _virtual(out: KernelText, spec: KernelSpec) -> None:
    """Several ranks in one launch: the low programs are all ranks' copy programs, hop by hop."""
    names = attend_arguments(spec)
    out(
        f"rank = program % {spec.virtual}",
        f"program = program // {spec.virtual}",
        f"programs = programs // {spec.virtual}",
        f"mine = virtual_ptr + rank * {len(VIRTUAL_ROW)}",
    )
    kinds = {"out": "ELEMENT", "state": "tl.float32", "lse": "tl.float32"}
    kinds |= dict.fromkeys(("q_positions", "k_positions", "spans", "counters"), "tl.int32")
    for i, name in enumerate(VIRTUAL_ROW):
        if f"{name}_ptr" in names:
            kind = kinds.get(name, "tl.int64").replace("ELEMENT", spec.element)
            out(f"{name}_ptr = tl.multiple_of(tl.load(mine + {i}).to(tl.pointer_type({kind})), 16)")
        elif name in names:
            out(f"{name} = tl.load(mine + {i}).to(tl.int32)")


def _wait(out: KernelText, slot: str) -> None:
    """Wait for a slot, if the schedule says so."""
    with out.block(f"if {slot} >= 0:"):
        out.wait(slot)


def _forward(out: KernelText) -> None:
    """Copy programs: a hop waits for its chunk and sends it on. Hops go in the schedule's order."""
    out("hop = program")
    with out.block("while hop < num_forwards:"):
        out(f"forward = forwards_ptr + hop * {len(FORWARD)}")
        out.read("forward", FORWARD)
        _wait(out, "slot")
        signal_at = f"signals_at + {line_of('to_slot')}"
        near = [
            f"to = {heap_of('dst')}",
            "copy_words(to + bank_at + to_at, bank + at, (nbytes + 3) // 4, 0, 1, 2048)",
            "tl.debug_barrier()  # every thread's stores happen before thread 0's release",
            f"raise_signal(to + {signal_at}, signal)",
        ]
        # Far away it goes straight from where it arrived: no staging.
        with out.block("if unbroken(place_ptr) != 0:"):
            out.fork(near, out.put_signal("bank + at", "to_at", signal_at))
        out("hop += COPY_PROGRAMS")


def _attend(out: KernelText, spec: KernelSpec) -> None:
    """Attending programs: every ``workers``-th tile of each unit, in the order of the units."""
    out("me = program - COPY_PROGRAMS", "workers = programs - COPY_PROGRAMS")
    out("d = tl.arange(0, D_BLOCK)", "e = tl.arange(0, E_BLOCK)")
    out("u = 0")
    with out.block("while u < num_units:"):
        out(f"unit = units_ptr + u * {len(UNIT)}")
        wanted = ["first_key", "last_key", "done"] + (["fresh"] if spec.carry else [])
        out(f"query = queries_ptr + tl.load(unit) * {len(QUERY)}")
        out(*columns("unit", UNIT, {name: name for name in wanted}))
        out(*columns("query", QUERY, {"q_slot": "slot", "q_at": "at"}))
        small = {"rows": "rows", "pitch": "pitch", "first_tile": "first_tile"}
        small |= ({"q_position": "position"} if spec.needs_positions else {}) | (
            {"q_came": "came"} if spec.wire.q != SAME else {}
        )
        out(*columns("query", QUERY, small, small=True))
        out("blocks = (rows + BM - 1) // BM", "tiles = blocks * batch * heads")
        out("start = (me + workers - first_tile % workers) % workers  # the same program in every unit", "tile = start")
        # A signal that was seen once stays: what follows in this program's order sees the chunk too.
        with out.block("if (q_slot >= 0) & (tile < tiles):"):
            out.wait("q_slot")
        with out.block("while tile < tiles:"):
            _tile(out, spec)
            out("tile += workers")
        out("u += 1")


def _tile(out: KernelText, spec: KernelSpec) -> None:
    """A block of BM queries of one batch and head against a unit's run of key chunks."""
    out("bh = tile // blocks", "row = (tile % blocks) * BM + tl.arange(0, BM)", "inside = row < rows")
    if _split_early(spec):
        out("b = bh // heads", "h = first_head + bh % heads")
    out(f"kv_bh = b * kv_heads + h // {spec.group} - first_kv" if spec.group > 1 else "kv_bh = bh")
    _load_queries(out, spec)
    if spec.needs_positions:
        out("q_place = tl.load(q_positions_ptr + q_position + row, mask=inside, other=0)")
    out(
        'm = tl.full([BM], float("-inf"), tl.float32)  # running maximum of the scores, in powers of two',
        "l = tl.zeros([BM], tl.float32)  # running sum of exp2(score - m)",
        "acc = tl.zeros([BM, E_BLOCK], tl.float32)",
    )
    if spec.carry:
        _load_state(out)
    out("j = first_key")
    with out.block("while j < last_key:"):
        _key_chunk(out, spec)
        out("j += 1")
    with out.block("if done != 0:"):
        _finish(out, spec)
    if spec.carry:
        with out.block("else:"):
            _store_state(out)


def _load_queries(out: KernelText, spec: KernelSpec) -> None:
    """The tile's queries: own ones as they are, others as they have travelled."""
    limits = ["inside[:, None]"] + (["(d < D)[None, :]"] if is_padded(spec.head_dim) else [])
    own = [
        f"q_ptr = {_pointer(spec, 'bank + q_at', spec.head_dim)}",
        "q_ptr += (bh * pitch).to(tl.int64) * D",
        f"q = tl.load(q_ptr + row[:, None] * D + d[None, :]{_masked(limits)})",
    ]
    written = spec.wire.q
    if written == SAME:
        out(*own)
        return
    with out.block("if q_came != 0:"):
        out("q_row = (bh * pitch).to(tl.int64) + row")
        out(*pointers(written, "q", "bank + q_at", "(batch * heads * pitch).to(tl.int64)", spec.head_dim))
        at = "q_row[:, None] * D + d[None, :]"
        out(*loaded(written, "q", spec.dtype, at, limits, "q_row", ["inside"], "[:, None]"))
    with out.block("else:"):
        out(*own)


def _load_state(out: KernelText) -> None:
    """Softmax state of an earlier unit: BM maxima, BM sums, BM rows of E_BLOCK values, all fp32, by tile."""
    out("lane = tl.arange(0, BM)")
    out("state = state_ptr + (first_tile + tile).to(tl.int64) * (BM * (E_BLOCK + 2))")
    with out.block("if fresh == 0:"):
        out(
            "tl.debug_barrier()  # another thread of this program may have stored what this one loads",
            "m = tl.load(state + lane)",
            "l = tl.load(state + BM + lane)",
            "acc = tl.load(state + 2 * BM + lane[:, None] * E_BLOCK + e[None, :])",
        )


def _store_state(out: KernelText) -> None:
    """For a later unit."""
    out(
        "# The same place, worked out anew (j is last_key): addresses kept through the loop cost registers.",
        "again = lane + (j - last_key).to(tl.int32)",
        "tl.store(state + again, m)",
        "tl.store(state + BM + again, l)",
        "tl.store(state + 2 * BM + again[:, None] * E_BLOCK + e[None, :], acc)",
    )


def _key_chunk(out: KernelText, spec: KernelSpec) -> None:
    """Wait for a chunk of keys and values on the program's first tile, then attend to it block by block."""
    out(f"key = keys_ptr + j * {len(KEY)}")
    out(*columns("key", KEY, {name: name for name in ("k_at", "v_at")}))
    small = {"columns": "rows", "k_pitch": "pitch"} | ({"k_position": "position"} if spec.needs_positions else {})
    small |= {} if spec.wire.k == spec.wire.v == SAME else {"came": "came"}
    out(*columns("key", KEY, small, small=True))
    if spec.causal:
        out(*seen_columns())
    with out.block("if tile == start:  # of this unit: as for the queries"):
        out(*columns("key", KEY, {name: name for name in ("k_slot", "v_slot")}))
        _wait(out, "k_slot")
        _wait(out, "v_slot")
    out("head_at = (kv_bh * k_pitch).to(tl.int64)")
    out(f"k_ptr = {_pointer(spec, 'bank + k_at', spec.head_dim)} + head_at * D")
    out(f"v_ptr = {_pointer(spec, 'bank + v_at', spec.v_head_dim)} + head_at * E")
    if spec.wire.k == spec.wire.v == SAME:
        _blocks(out, spec)
        return
    with out.block("if came != 0:"):
        out("key_rows = (batch * kv_heads * k_pitch).to(tl.int64)")
        for name, width in (("k", spec.head_dim), ("v", spec.v_head_dim)):
            written = getattr(spec.wire, name)
            if written != SAME:
                out(*pointers(written, name, f"bank + {name}_at", "key_rows", width))
        _blocks(out, spec, came=True)
    with out.block("else:"):
        _blocks(out, spec)


def _blocks(out: KernelText, spec: KernelSpec, came: bool = False) -> None:
    """All blocks of a chunk of keys that the tile sees any of; ``came``: as it has travelled."""
    end = "seen" if spec.causal else "columns"
    if spec.tails == "apart":
        out(f"full = {end} // BN * BN")
        with out.block("for n in range(0, full, BN):"):
            _block(out, spec, tail=False, came=came)
        with out.block(f"if full < {end}:"):
            out("n = full")
            _block(out, spec, tail=True, came=came)
    else:
        with out.block(f"for n in range(0, {end}, BN):"):
            _block(out, spec, tail=spec.tails == "inside", came=came)


def _block(out: KernelText, spec: KernelSpec, tail: bool, came: bool) -> None:
    """One block of keys: scores, softmax state, weighted values."""
    # Three products of TF32 give nearly fp32's precision on tensor cores; the interpreter computes in fp32 anyway.
    precision = ', input_precision="tf32x3"' if spec.dtype == "fp32" else ""
    out("col = n + tl.arange(0, BN)")
    limits = ["col < columns"] if tail else []
    k_mask = [f"({limit})[None, :]" for limit in limits] + (["(d < D)[:, None]"] if is_padded(spec.head_dim) else [])
    v_mask = [f"({limit})[:, None]" for limit in limits] + (["(e < E)[None, :]"] if is_padded(spec.v_head_dim) else [])
    if came and spec.wire.k != SAME:
        at = "(head_at + col)[None, :] * D + d[:, None]"
        out(*loaded(spec.wire.k, "k", spec.dtype, at, k_mask, "head_at + col", limits, "[None, :]"))
    else:
        out(f"k = tl.load(k_ptr + col[None, :] * D + d[:, None]{_masked(k_mask)})")
    if came and spec.wire.v != SAME:
        at = "(head_at + col)[:, None] * E + e[None, :]"
        out(*loaded(spec.wire.v, "v", spec.dtype, at, v_mask, "head_at + col", limits, "[:, None]"))
    else:
        out(f"v = tl.load(v_ptr + col[:, None] * E + e[None, :]{_masked(v_mask)})")
    visible = _visible(out, spec, tail)
    # A bias is added in powers of two; else scores are scaled when they are subtracted, which saves a product.
    biased = spec.mask != "none" and not spec.mask_is_bool
    out(f"s = tl.dot(q, k{precision}){' * QK_SCALE + bias' if biased else ''}")
    for condition in visible:
        out(f's = tl.where({condition}, s, float("-inf"))')
    out(f"m_new = tl.maximum(m, tl.max(s, 1){'' if biased else ' * QK_SCALE'})")
    reference = "m_new"
    if spec.needs_positions:  # a query may have seen no key yet
        out('m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)')
        reference = "m_safe"
    out(
        f"p = tl.exp2({'s' if biased else 's * QK_SCALE'} - {reference}[:, None])",
        f"alpha = tl.exp2(m - {reference})",
        "l = l * alpha + tl.sum(p, 1)",
        f"acc = tl.dot(p.to({spec.element}), v, acc * alpha[:, None]{precision})",
        "m = m_new",
    )


def _visible(out: KernelText, spec: KernelSpec, tail: bool) -> list[str]:
    """Loads what hides keys from queries; the conditions under which a score counts."""
    conditions = ["(col < columns)[None, :]"] if tail else []
    if not spec.needs_positions:
        return conditions
    limit = ", mask=col < columns, other=0" if tail else ""
    out(f"k_place = tl.load(k_positions_ptr + k_position + col{limit})")
    if spec.causal:
        conditions.append("k_place[None, :] <= q_place[:, None]")
    if spec.mask == "none":
        return conditions
    if spec.mask == "key":
        where, stays = "mask_ptr + b.to(tl.int64) * mask_sb + k_place.to(tl.int64) * mask_sc", "[None, :]"
        limits = ["col < columns"] if tail else []
    else:
        out(
            "mask_row = (mask_ptr + b.to(tl.int64) * mask_sb + h * mask_sh + q_place.to(tl.int64) * mask_sr)[:, None]",
            "mask_col = (k_place.to(tl.int64) * mask_sc)[None, :]",
        )
        where, stays = "mask_row + mask_col", ""
        limits = ["inside[:, None]"] + (["(col < columns)[None, :]"] if tail else [])
    out(f"bias = tl.load({where}{_masked(limits, '0')})")
    if spec.mask_is_bool:
        conditions.append(f"(bias != 0){stays}")
    else:
        out("bias = bias.to(tl.float32)", f"bias = ({least('bias', repr(LOG2E), _LEAST, _LEAST)}){stays}")
    return conditions


def _finish(out: KernelText, spec: KernelSpec) -> None:
    """A query's last unit: its output goes to the caller's tensor, or home."""
    out(f"o_wide = acc / {'tl.where(l == 0.0, 1.0, l)' if spec.needs_positions else 'l'}[:, None]")
    out(f"o = o_wide.to({spec.element})")
    stores = f"mask=inside[:, None]{' & (e < E)[None, :]' if is_padded(spec.v_head_dim) else ''}"

    if not spec.pushes:
        _store_own(out, spec, stores)
        return
    out(*columns("query", QUERY, {"dst": "dst"}))
    with out.block("if dst < 0:"):
        _store_own(out, spec, stores)
    with out.block("else:"):
        _push(out, spec, stores)


def _store_own(out: KernelText, spec: KernelSpec, stores: str) -> None:
    """This rank's own queries: into the caller's tensor, at their heads and rows."""
    if not _split_early(spec):
        out("b = bh // heads", "h = first_head + bh % heads")
    out(
        f"first_row = tl.load(query + {QUERY.index('out_at')})",
        "own_ptr = out_ptr + b.to(tl.int64) * out_sb + h.to(tl.int64) * out_sh + first_row * out_sr",
        "own_ptr += row.to(tl.int64)[:, None] * out_sr + e[None, :]",
        f"tl.store(own_ptr, o, {stores})",
    )
    if spec.lse:
        out(
            f"lse = m * {LN2!r} + tl.log(l)",
            "tl.store(lse_ptr + bh.to(tl.int64) * own_rows + first_row + row, lse, mask=inside)",
        )


def _push(out: KernelText, spec: KernelSpec, stores: str) -> None:
    """Home: stored straight into the peer's slot; by NVSHMEM the last program of the chunk sends it as a whole."""
    wanted = ["out_at", "out_slot"]
    wanted += ["staging", "nbytes"] if spec.reach != "peer" else []
    wanted += ["net"] if spec.reach == "mixed" else []
    out(*columns("query", QUERY, {name: name for name in wanted}))
    if spec.reach != "nvshmem":
        out(f"to = {heap_of('dst')}")
    out.target("out_at", heap="to", revise=True)
    written = spec.wire.o
    if written == SAME:
        out(
            f"target_ptr = {_pointer(spec, 'target', spec.v_head_dim)}",
            "target_ptr += (bh * rows).to(tl.int64) * E",
            f"tl.store(target_ptr + row[:, None] * E + e[None, :], o, {stores})",
        )
    else:  # from fp32, so that it is rounded once
        out("o_row = (bh * rows).to(tl.int64) + row", "o_rows = (batch * heads * rows).to(tl.int64)")
        out(*pointers(written, "o", "target", "o_rows", spec.v_head_dim))
        at, inside = "o_row[:, None] * E + e[None, :]", stores.removeprefix("mask=")
        out(*stored(written, "o", "o_wide", at, inside, "o_row", "inside"))
    with out.block("if last_of(counters_ptr + out_slot, tiles):"):
        out.announce("out_slot", "out_at", heap="to")


def _pointer(spec: KernelSpec, address: str, width: int) -> str:
    """A pointer to elements; an integer carries no alignment, and without it every load is of one element."""
    pointer = f"({address}).to(tl.pointer_type({spec.element}))"
    return f"tl.multiple_of({pointer}, 16)" if width * spec.element_bytes % 16 == 0 else pointer


def _masked(limits: list[str], other: str = "0.0") -> str:
    return f", mask={' & '.join(limits)}, other={other}" if limits else ""
