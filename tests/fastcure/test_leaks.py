"""Nothing outlives its step: tensors and graphs are counted, after many steps and after steps that fail."""

import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from fuzzing import FUZZ, TRIED
from networks import NETWORKS, Case, make
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE, curvature, prepare
from fastcure.engines import ENGINES as ALL_ENGINES
from fastcure.engines.compile import Compile
from fastcure.engines.cuda_graph import CudaGraph

ENGINES = ["eager", "first_order", "reference"]


@pytest.fixture(autouse=True)
def _what_was_there_before() -> None:
    """Neither counted nor searched for cycles: that would take longer than the steps."""
    gc.collect()
    gc.freeze()


class Saved:
    """A tensor kept by the graph of autograd, which is nowhere in Python's own books."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@contextmanager
def counted(saved: bool = True) -> Iterator[Callable[[], Counter[str]]]:
    """Count what is alive, by kind; without the collector of cycles, so that a cycle counts as a leak.

    Tensors that graphs save are counted with `saved`, which `torch.func` within a compiled region does not allow.
    """

    def count() -> Counter[str]:
        kinds = Counter[str]()
        for thing in gc.get_objects():
            kind = type(thing)  # isinstance would look into proxies
            if issubclass(kind, (Tensor, Saved)) or kind.__name__.endswith("Backward"):
                kinds[kind.__name__] += 1
        return kinds

    gc.collect()
    gc.disable()
    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor)
        with hooks if saved else nullcontext():
            yield count
    finally:
        gc.enable()


def test_the_count_sees_a_graph_that_is_kept() -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    curvature(*case)  # torch imports its compiler at a first step, whose frames it keeps until the next collection
    with counted() as count:
        before = count()
        kept = curvature(*case)
        held = count() - before
        assert held["Saved"] > 4
        assert held["Tensor"] > 4
        assert held["_AttachBackward"] == 1
        del kept
        assert count() == before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mlp-softplus", "batch_norm-gelu-average"])
def test_many_steps_hold_no_more_than_ten(name: str, engine: str) -> None:
    steps = 60 if not name.startswith("mlp") else 1000 if FUZZ > 1 else 120
    case = make(NETWORKS[name], 4, seed=0, dtype=torch.float32)
    cure = CURE(prepare(case.model, case.x), engine=engine)
    optimizer = torch.optim.Adam(cure.parameters(), lr=1e-4)
    with counted() as count:
        for step in range(1, steps + 1):
            out = cure(case.x, case.y)
            optimizer.zero_grad()
            out.total.backward()
            optimizer.step()
            if step == 10:
                early = count()
        assert count() == early


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_without_a_backward_hold_nothing(engine: str) -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    with counted() as count:
        curvature(*case, engine=engine)
        early = count()
        for batch_stats in ("frozen", "split"):
            for _ in range(20):
                curvature(*case, engine=engine, batch_stats=batch_stats)
        assert count() == early


class Fails(nn.Module):
    """Fails on demand: in its `call`-th forward, or where a gradient passes through it for the `call`-th time."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.call, self.calls = "", 0, Counter[str]()

    def forward(self, x: Tensor) -> Tensor:
        self.pass_through("forward")
        return _FailsIn.apply(x, self, "backward")

    def pass_through(self, where: str) -> None:
        self.calls[where] += 1
        if where == self.where and self.calls[where] == self.call:
            raise KeyError(where)

    def disarm(self) -> None:
        self.where, self.calls = "", Counter()

    def arm(self, where: str, call: int) -> None:
        self.where, self.call, self.calls = where, call, Counter()


class _FailsIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Fails, where: str) -> Tensor:
        ctx.layer, ctx.where = layer, where
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.layer.pass_through(ctx.where)
        return _FailsIn.apply(g, ctx.layer, "double backward") if ctx.where == "backward" else g.clone(), None, None


def failing(engine: str, **options: Any) -> tuple[Case, Fails, Callable[[], None]]:
    """A case, the layer that fails, and a step."""
    case, fails = make(NETWORKS["batch_norm-gelu-average"], 4, seed=0), Fails()
    model = nn.Sequential(*list(case.model)[:3], fails, *list(case.model)[3:]).double()
    model[1].eval()
    case = Case(model, case.x, case.y)
    cure = CURE(prepare(model, case.x), engine=engine, **options)

    def step() -> None:
        cure(case.x, case.y).total.backward()

    return case, fails, step


def snapshot(model: nn.Module) -> list[Any]:
    """All that a step must not change, its `.grad` apart."""
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return [
        tensors,
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        [id(p) for p in model.parameters()],
    ]


def check_same(model: nn.Module, before: list[Any]) -> None:
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(a, b) for a, b in zip(after[0], before[0], strict=True))


def settle() -> None:
    """Let Python drop the cycle of a traceback and its frames, and torch what its CPU queue still held.

    A backward that fails within another leaves the nodes that were next in that queue, which the next backward empties.
    """
    torch.ones((), requires_grad=True).backward()
    gc.collect()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["forward", "backward", "double backward"])
def test_a_step_that_fails_anywhere_leaves_nothing(engine: str, where: str) -> None:
    case, fails, step = failing(engine)
    step()
    fails.disarm()
    case.model.zero_grad()
    step()  # learns how often the layer is passed
    passes = fails.calls[where]
    assert passes > 0 or (engine, where) == ("first_order", "double backward")
    gradients = [p.grad.clone() for p in case.model.parameters()]
    before = snapshot(case.model)
    with counted() as count:
        held = count()
        for call in range(1, passes + 1):
            fails.arm(where, call)
            with pytest.raises(KeyError, match=where):
                step()
            assert fails.calls[where] == call
            settle()
            assert count() == held
            check_same(case.model, before)
            assert all(torch.equal(p.grad, g) for p, g in zip(case.model.parameters(), gradients, strict=True))
    fails.disarm()
    case.model.zero_grad()
    step()
    assert all(torch.equal(p.grad, g) for p, g in zip(case.model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("call", [1, 2])
def test_a_loss_that_fails_leaves_nothing(engine: str, call: int) -> None:
    case, calls = make(NETWORKS["batch_norm-gelu-average"], 4, seed=0), []

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == call:
            raise KeyError("loss")
        return F.cross_entropy(logits, y, reduction="none")

    before = snapshot(case.model)
    with counted() as count:
        held = count()
        with pytest.raises(KeyError, match="loss"):
            curvature(*case, loss_fn=loss_fn, engine=engine)
        settle()
        assert count() == held
    check_same(case.model, before)
    assert all(p.grad is None for p in case.model.parameters())


MODES: list[dict[str, Any]] = [{}, {"batch_stats": "split"}, {"microbatch": 3}, {"power": 1}]
FEW = [("eager", mode) for mode in MODES[:3]] + [("first_order", MODES[2]), ("reference", MODES[1])]


@pytest.mark.parametrize(("engine", "options"), [*product(ENGINES, MODES)] if FUZZ > 1 else FEW, ids=str)
def test_a_long_run_with_failures_holds_no_more_than_ten_steps(engine: str, options: dict[str, Any]) -> None:
    """Every fourth step is made to fail, in one pass or another; `make soak` takes a thousand."""
    case, fails, step = failing(engine, **options)
    optimizer = torch.optim.Adam(case.model.parameters(), lr=1e-4)
    chance, faults = random.Random(0), 0
    with counted() as count:
        for number in range(1, (1000 if FUZZ > 1 else 20) + 1):
            optimizer.zero_grad()
            fails.disarm()
            if number > 10 and number % 4 == 0:
                fails.arm(["forward", "backward", "double backward"][number // 4 % 3], chance.randint(1, 2))
            try:
                step()
                optimizer.step()
            except KeyError:
                faults += 1
                settle()
            if number == 10:
                settle()
                early = count()
        settle()
        optimizer.zero_grad()
        fails.disarm()
        step()
        optimizer.step()  # it makes Python objects of the gradients
        assert count() == early
    assert faults
    TRIED[f"steps, {engine}"] += number
    TRIED[f"steps that were made to fail, {engine}"] += faults


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own making
def test_a_long_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ENGINES, "compile", Compile("aot_eager"))
    case = make(NETWORKS["mlp-softplus"], 4, seed=0, dtype=torch.float32)
    cure = CURE(case.model, engine="compile")
    optimizer = torch.optim.Adam(cure.parameters(), lr=1e-4)
    with counted(saved=False) as count:
        for number in range(1, (1000 if FUZZ > 1 else 20) + 1):
            optimizer.zero_grad()
            cure(case.x, case.y).total.backward()
            optimizer.step()
            if number == 10:
                gc.collect()
                early = count()
        gc.collect()
        assert count() == early
    torch._dynamo.reset()
    TRIED["steps, compile"] += number


class Rooted(nn.Module):
    """Its layers refer to it, and so does a loss that is a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Softplus(), nn.BatchNorm2d(3)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(108, 3))
        for module in self.body:
            module.root = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none")


class Rerun:
    """A recorder that runs nothing again, and keeps nothing."""

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        return work(), int


@pytest.mark.parametrize("engine", [*ALL_ENGINES])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own making
def test_a_model_that_its_children_refer_to_is_freed(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ENGINES, "compile", Compile("aot_eager"))
    monkeypatch.setitem(ALL_ENGINES, "cuda_graph", CudaGraph(Rerun, "cpu"))
    model, x = Rooted(), torch.rand(2, 1, 8, 8)
    cure = CURE(prepare(model, x), loss_fn=model.loss, engine=engine)
    for _ in range(2):
        cure(x, torch.tensor([0, 1])).total.backward()
    alive = [weakref.ref(cure), weakref.ref(model), weakref.ref(model.body[0]), weakref.ref(model.body[0].weight)]
    del cure, model
    gc.collect()
    assert [reference() for reference in alive] == [None] * 4
    torch._dynamo.reset()
