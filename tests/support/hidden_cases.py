"""What a rank's model reads beside its inputs, made different on one rank: ``run(rank, CASE)``."""

from __future__ import annotations

import torch
from model_cases import Plain, close, compiled, rank, ranks, tokens

from sfcompile.backend import reports
from sfcompile.errors import RankMismatchError
from sfcompile.runtime.rank.session import current_session
from sfcompile.torch_private import no_torch_function


def run(rank: int, case: str, *arguments: str) -> None:
    """One case on one rank."""
    with torch.no_grad():
        globals()[f"case_{case}"](*arguments)


class Noisy(Plain):
    """Draws inside, keeps what it saw in a buffer, and adds a constant."""

    def __init__(self, constant: float = 0.5) -> None:
        super().__init__()
        self.constant = [constant] * 32
        self.register_buffer("seen", torch.zeros(1, 1, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x + 0.1 * torch.randn_like(x) + torch.tensor(self.constant) + self.seen)
        self.seen.copy_(y.mean((0, 1), keepdim=True))
        return y


def case_hidden_inputs() -> None:
    """What a model reads beside its inputs must be equal too: the generator's state, buffers that it writes to."""
    eager, x = Noisy(), tokens()
    run = compiled(Noisy(), placement="shard")
    model = run._orig_mod
    for seed in (1, 2):
        torch.manual_seed(seed)
        want = eager(x)
        torch.manual_seed(seed)
        close(run(x), want)
        close(model.seen, eager.seen)
    for differ in (lambda: torch.manual_seed(rank()), lambda: model.seen.add_(rank())):
        kept = model.seen.clone()
        torch.manual_seed(7)
        differ()
        try:
            run(x)
            raise AssertionError("a difference was not noticed")
        except RankMismatchError:
            model.seen.copy_(kept)
            torch.manual_seed(9)
            run(x)
    given = compiled(Noisy(), placement="shard", inputs="rank0")
    eager = Noisy()
    for step in range(2):
        torch.manual_seed(step)
        want = eager(x)
        torch.manual_seed(step + rank())
        given._orig_mod.seen.add_(0.25 * rank())
        close(given(x + rank()), want)
        close(given._orig_mod.seen, eager.seen)


def case_other_constants() -> None:
    compiled(Noisy(0.5 + rank()), placement="shard")(tokens())


def case_other_memory() -> None:
    """Weights that are replaced between calls, on one rank only."""
    model, x = Plain(), tokens()
    run = compiled(model, placement="shard")
    run(x)
    model.out[1].bias.data = model.out[1].bias.data + rank()
    run(x)


class Scaled(Plain):
    """Takes a step's number and a scale as Python numbers."""

    def forward(self, x: torch.Tensor, step: float, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x + torch.full((x.shape[0], 1, 1), step / 1000.0)) * scale


def case_numbers() -> None:
    """Numbers that change are inputs: two programs serve them all; other ones on a rank are an error, or rank 0's."""
    eager, x = Scaled(), tokens()
    run, before = compiled(Scaled(), placement="shard"), len(reports())
    for step in range(6):
        for given in ((999 - 37 * step, 1.0), (0.1 + step, 1 + step / 7)):
            close(run(x, *given), eager(x, *given))
    assert len(reports()) - before <= 5, len(reports()) - before  # ints and floats, each fixed at first
    for given in ((7 + rank(), 1.0), (0.5, 2.0 + rank())):
        try:
            run(x, *given)
            raise AssertionError("other numbers were not noticed")
        except RankMismatchError:
            close(run(x, 0.25, 3.0), eager(x, 0.25, 3.0))
    given = compiled(Scaled(), placement="shard", inputs="rank0")
    for step in range(3):
        got = given(x, 10 * step + (step > 1) * rank(), 1.0 + step + (step > 1) * rank())
        close(got, eager(x, 10 * step, 1.0 + step))


def case_package(path: str) -> None:
    """A package's model reads the generator and a buffer too: compared, or rank 0's."""
    from sfcompile.package.export import export
    from sfcompile.package.load import load

    x = tokens(36)
    compiled(Plain(), placement="shard")(x)  # the ranks have a session, to wait for the export in
    for inputs in ("rank0", "checked"):
        if rank() == 0:
            options = {"topology": f"1x{ranks()}", "placement": "shard", "inner": "eager", "inputs": inputs}
            export(Noisy(), (x,), {}, f"{path}-{inputs}", **options)
        current_session().meet()
        loaded, eager = load(f"{path}-{inputs}"), Noisy()
        for step in range(2):
            torch.manual_seed(step)
            want = eager(x)
            torch.manual_seed(step + rank() * (inputs == "rank0"))
            close(loaded(x + rank() * (inputs == "rank0")), want)
        if inputs == "checked":
            torch.manual_seed(rank())
            try:
                loaded(x)
                raise AssertionError("other states of the generator were not noticed")
            except RankMismatchError:
                pass


class Named(torch.Tensor):
    """A class whose ops are torch's, which Dynamo takes for a plain tensor."""

    __torch_function__ = no_torch_function


class NamedWeight(torch.nn.Parameter):
    """The same of a weight."""


def case_named_tensors() -> None:
    """Inputs and weights of a class of their own are compared, or rank 0's, like others."""
    model, x = Plain(), tokens()
    want, mine = model(x), (x + rank()).as_subclass(Named)
    run = compiled(model, placement="shard")
    close(run(x.as_subclass(Named)), want)
    try:
        run(mine)
        raise AssertionError("another input was not noticed")
    except RankMismatchError as error:
        assert "with inputs" in str(error), error
    torch._dynamo.reset()
    close(compiled(model, placement="shard", inputs="rank0")(mine), want)
    torch._dynamo.reset()
    model.out[0].bias = NamedWeight(model.out[0].bias + rank(), requires_grad=False)
    try:
        compiled(model, placement="shard")(x)
        raise AssertionError("another weight was not noticed")
    except Exception as error:
        assert "weights (are they seeded or loaded alike?)" in str(error), error
