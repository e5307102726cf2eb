"""Disks and packages: full, unwritable, missing, damaged, of another model, on one rank or on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model_cases import Plain, tokens

from torture import places
from torture.faults.out_of_step import another, other, raising
from torture.rank import Injected, Rank
from torture.table import fault

OURS = ("*.sf",)


@fault("exact or an error on all", small_shm=8192, quick=True)
def shared_memory_is_full(rank: Rank) -> None:
    """/dev/shm has room for nothing."""
    model = Plain()
    run = rank.compiled(model)
    rank.call("first", run, model, must="either")
    rank.call("second", run, model, must="either")


@fault("exact or an error on all", own_shm=True)
def shared_memory_of_its_own_on_each_rank(rank: Rank) -> None:
    """Each rank in a container of its own, on one machine."""
    model = Plain()
    run = rank.compiled(model)
    rank.call("first", run, model, must="either")
    rank.call("second", run, model, must="either")


@fault("exact or an error on all", ranks=3, own_shm=True)
def shared_memory_full_on_one_rank(rank: Rank) -> None:
    """As in containers, and that of rank 1 is full."""
    if rank.number == 1:
        places.mount_memory(places.SHM, 4096)
    shared_memory_of_its_own_on_each_rank(rank)


@fault("an error on all; then exact", ranks=3, small_shm=512 * 1024)
def shared_memory_full_for_a_larger_model(rank: Rank) -> None:
    """The first model's heap fits, the second one's does not."""
    run, model = rank.warm()
    rank.call("large", run, model, tokens(4000), must="either")
    rank.recovers(run, model)


# ---------------------------------------------------------------------- packages


def package(rank: Rank, name: str = "model.sf", model: Any = None, ranks: int | None = None) -> Path:
    """Rank 0 exports a model for all."""
    from sfcompile.package.export import export

    path = rank.folder / name
    if rank.number == 0:
        topology = f"1x{ranks or rank.ranks}"
        export(model or Plain(), (tokens(),), {}, path, topology=topology, placement="shard", inner="eager")
    rank.meet(f"exported {name}")
    return path


def loads(rank: Rank, path: Path, must: str = "error", name: str = "load") -> Any:
    """Attempt a load."""
    from sfcompile.package.load import load

    return rank.attempt(name, lambda: load(path, timeout_s=rank.timeout_s), must=must)


@fault("an error on both; then exact", outputs=OURS)
def a_missing_package_on_one_rank(rank: Rank) -> None:
    """The path is wrong on rank 1."""
    path = package(rank)
    loads(rank, path if rank.number == 0 else rank.folder / "none.sf")
    loaded = loads(rank, path, "exact", "good")
    rank.call("call", loaded, Plain())


@fault("an error on both, at once; then exact", outputs=OURS)
def a_load_refused_on_one_rank(rank: Rank) -> None:
    """Rank 1 names an inner compiler that there is not, in the first thing that it asks for."""
    from sfcompile.package.load import load

    path = package(rank)
    inner = "spiral" if rank.number == 1 else "eager"
    rank.attempt("load", lambda: load(path, timeout_s=rank.timeout_s, inner=inner), must="error")
    loaded = loads(rank, path, "exact", "good")
    rank.call("call", loaded, Plain())


@fault("an error on both; then exact", outputs=OURS)
def a_damaged_package_on_one_rank(rank: Rank) -> None:
    """The copy of rank 1 has a byte changed in its middle."""
    path = package(rank)
    copy = rank.folder / "copy.sf"
    if rank.number == 1:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        copy.write_bytes(raw)
    loads(rank, path if rank.number == 0 else copy)
    loaded = loads(rank, path, "exact", "good")
    rank.call("call", loaded, Plain())


@fault("an error on both; then exact", outputs=OURS)
def a_cut_package_on_one_rank(rank: Rank) -> None:
    """The copy of rank 1 ends in its middle."""
    path = package(rank)
    copy = rank.folder / "copy.sf"
    if rank.number == 1:
        raw = path.read_bytes()
        copy.write_bytes(raw[: len(raw) // 2])
    loads(rank, path if rank.number == 0 else copy)
    loaded = loads(rank, path, "exact", "good")
    rank.call("call", loaded, Plain())


@fault("an error on both; then exact", outputs=OURS, quick=True)
def another_package_on_one_rank(rank: Rank) -> None:
    """Rank 1 loads the package of another model."""
    first, second = package(rank), package(rank, "other.sf", other())
    loads(rank, first if rank.number == 0 else second)
    loaded = loads(rank, first, "exact", "good")
    rank.call("call", loaded, Plain())


@fault("an error on both", outputs=OURS)
def a_package_for_other_ranks(rank: Rank) -> None:
    """Exported for three ranks; two run."""
    loads(rank, package(rank, ranks=3))


@fault("an error on both", outputs=OURS)
def a_package_of_another_version(rank: Rank) -> None:
    """Rank 1 runs another release than the one that exported."""
    import sfcompile.package.load as module

    path = package(rank)
    if rank.number == 1:
        module.__version__ = "0.0.9"
    loads(rank, path)


@fault("an error on both; then exact", outputs=OURS)
def another_shape_into_a_package(rank: Rank) -> None:
    """A loaded package is called with other shapes, on one rank and then on both."""
    model = Plain()
    loaded = loads(rank, package(rank), "exact")
    rank.call("good", loaded, model)
    rank.call("one rank", loaded, model, tokens(48 if rank.number else 50), must="error")
    rank.recovers(loaded, model)
    rank.call("both", loaded, model, tokens(48), must="error")
    rank.recovers(loaded, model)


@fault("the user's error on one, ours on the others", ranks=3, outputs=OURS)
def a_foreign_exception_in_a_load(rank: Rank) -> None:
    """What builds a part of a package raises on rank 1 what nobody thought of."""
    path = package(rank)
    if rank.number == 1:
        rank.before("sfcompile.package.load:open_part", raising(Injected("in a load")))
    from sfcompile.package.load import load

    rank.attempt("load", lambda: load(path, timeout_s=rank.timeout_s), must="error", own=(Injected,))


@fault("an error on the survivors", ranks=3, outputs=OURS)
def killed_while_loading(rank: Rank) -> None:
    """Rank 1 is killed when it builds its part."""
    path = package(rank)
    if rank.number == 1:
        rank.before("sfcompile.package.load:open_part", rank.die)
    loads(rank, path)


@fault("an error on the survivors", ranks=3, outputs=OURS)
def killed_while_finishing_a_load(rank: Rank) -> None:
    """Rank 1 is killed when all have opened the package and make the heap."""
    path = package(rank)
    if rank.number == 1:
        rank.before("sfcompile.package.load:Part.finish", rank.die)
    loads(rank, path)


@fault("the victim dies, nothing is left but for the part that it wrote", outputs=(".*.part",))
def killed_while_exporting(rank: Rank) -> None:
    """Rank 0 is killed in the middle of an export; rank 1 waits in a call."""
    run, model = rank.warm()
    if rank.number == 0:
        rank.before("sfcompile.package.file:PackageWriter.finish", rank.die)
        package(rank)
    rank.call("next", run, model, must="error")


@fault("a PackageError, nothing left", quick=True)
def an_export_to_a_full_disk(rank: Rank) -> None:
    """The disk has room for a part of the package."""
    from sfcompile.package.export import export

    small = rank.folder / f"small{rank.number}"
    small.mkdir()
    places.own_mounts()
    places.mount_memory(small, 16384)
    rank.attempt(
        "export",
        lambda: export(Plain(), (tokens(),), {}, small / "model.sf", topology="1x2", inner="eager"),
        must="error",
    )
    rank.check("left", not list(small.iterdir()), f"{[path.name for path in small.iterdir()]}")


@fault("an error on both, the old package whole", outputs=OURS)
def an_interrupted_export(rank: Rank) -> None:
    """Ctrl-C while a package is written over an older one."""
    from sfcompile.package.export import export

    path = rank.folder / f"model{rank.number}.sf"
    export(Plain(), (tokens(),), {}, path, topology="1x2", inner="eager")
    before = path.read_bytes()
    rank.before("sfcompile.package.file:PackageWriter.finish", raising(KeyboardInterrupt()))
    rank.attempt(
        "export",
        lambda: export(other(), (tokens(),), {}, path, topology="1x2", inner="eager"),
        must="error",
        own=(KeyboardInterrupt,),
    )
    rank.check("old one", path.read_bytes() == before, "it changed")


@fault("an error on both; then exact")
def an_unwritable_dump_folder_on_one_rank(rank: Rank) -> None:
    """``dump`` names a folder that cannot be made on the disk of rank 1."""
    places.own_mounts()
    folder = rank.folder / "dump"
    if rank.number == 0:
        folder.mkdir()
    rank.meet("made")
    places.mount_memory(folder, None if rank.number == 0 else 4096)
    if rank.number == 1:
        (folder / "full").write_bytes(bytes(4096))
    model = Plain()
    rank.call("first", rank.compiled(model, dump=str(folder)), model, must="either")
    second = another()
    rank.recovers(rank.compiled(second), second)
