"""Which ranks a mesh names, and what else it says. Groups that compute: tests/e2e/test_processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from sfcompile import groups
from sfcompile.errors import OptionError
from sfcompile.groups import in_group, session_of_refused, world_size
from sfcompile.options import Options


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process that believes to be rank 1 of 4."""
    from torch.testing._internal.distributed import fake_pg

    assert fake_pg  # registers the backend "fake"
    dist.init_process_group("fake", store=dist.HashStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def test_options_without_a_group_stay_as_they_are() -> None:
    for asked in (Options(), Options(mesh={"ulysses": 2, "ring": 2})):
        assert in_group(asked) is asked and asked.group is None


def test_a_mesh_or_a_process_group_names_its_ranks(job: None, tmp_path: Path) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    for group in (mesh["sp"], mesh["sp"].get_group(), dist.new_group([0, 1])):
        asked = in_group(Options.from_dict({"mesh": group, "dump": tmp_path}))
        assert asked.mesh is None and asked.group == (0, 1) and world_size(asked) == 2
        assert asked.dump == tmp_path / "ranks-0-1"


def test_all_ranks_are_no_group(job: None) -> None:
    asked = in_group(Options.from_dict({"mesh": dist.group.WORLD}))
    assert asked.mesh is None and asked.group is None and world_size(asked) == 4


def test_axes_of_a_mesh_are_degrees(job: None) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "batch"))
    assert in_group(Options.from_dict({"mesh": mesh})).mesh == {"ulysses": 1, "ring": 2, "batch": 2}
    odd = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    with pytest.raises(OptionError, match=r"2 axes, named dp, sp.*mesh\['sp'\]"):
        in_group(Options.from_dict({"mesh": odd}))


def test_who_is_not_in_the_group_is_told_so(job: None) -> None:
    with pytest.raises(OptionError, match="rank 1 calls a model whose mesh holds ranks 0, 2"):
        in_group(Options(mesh=_Mesh([0, 2])))
    outside = dist.new_group([2, 3])
    with pytest.raises(OptionError, match="outside of the group"):
        Options.from_dict({"mesh": outside})


def test_a_mesh_of_a_job_that_has_ended_is_refused() -> None:
    with pytest.raises(OptionError, match="a job that has ended"):
        in_group(Options(mesh=_Mesh([0, 1])))


def test_options_that_are_refused_still_say_who_waits(job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of mesh, transport and timeout_s is read by itself, whatever is wrong with the others."""
    asked: list[Options] = []
    monkeypatch.setattr(groups, "session_for", asked.append)
    mine = dist.new_group([0, 1])
    session_of_refused({"meshh": 1, "timeout_s": 3.0, "transport": "smh"})
    session_of_refused({"schedule": "spiral", "mesh": {"ulyses": 2}, "transport": "c10d", "timeout_s": -1})
    session_of_refused({"mesh": mine, "schedule": "spiral"})
    session_of_refused({"mesh": dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp")), "timeout_s": 2})
    session_of_refused(None)
    told = [(options.group, options.transport, options.timeout_s) for options in asked]
    assert told == [(None, "auto", 3.0), (None, "c10d", 60.0), ((0, 1), "auto", 60.0), (None, "auto", 2.0),
                    (None, "auto", 60.0)]  # fmt: skip
    for unknown in (_Mesh([0, 2]), dist.new_group([2, 3]), "ulysses"):  # not this rank's group, or no group at all
        assert session_of_refused({"mesh": unknown}) is None
    assert len(asked) == 5


class _Mesh:
    """A mesh as a rank outside of it might be handed one."""

    mesh_dim_names, ndim = ("sp",), 1

    def __init__(self, ranks: list[int]) -> None:
        import torch

        self.mesh = torch.tensor(ranks)


@pytest.mark.parametrize("said", ["two", "0", "-1"])
def test_a_launcher_that_says_no_number_of_ranks_is_told_so(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(OptionError, match=f"WORLD_SIZE='{said}' in the environment.*torchrun"):
        world_size(Options())
    monkeypatch.setenv("WORLD_SIZE", "")
    assert world_size(Options()) == 1
