"""The graph passes of the compile engine, on the graphs that inductor would get: exact, complete, and no dearer."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from networks import relative
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node
from torch.utils.flop_counter import flop_registry

from fastcure import CURE, curvature
from fastcure.engines import ENGINES
from fastcure.engines._compile_rewrite import Rewrite
from fastcure.engines.compile import Compile
from fastcure.models import resnet8
from fastcure.profiling.flops import FlopCounter

# Of torch's own making, in torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
aten = torch.ops.aten


@pytest.fixture(params=["cpu", "cuda"])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """Puts an engine in the place of "compile" that runs the graphs as they are, and collects them.

    In the terms into which inductor takes torch's operators apart; and as on CUDA, where torch copies what it has
    transposed.
    """
    seen: list[Graph] = []

    def compiler(module: GraphModule, inputs: Any) -> Any:
        seen.append(module.graph)
        return make_boxed_func(module.forward)

    def partition(joint: GraphModule, inputs: Any, **options: Any) -> Any:
        if request.param == "cuda":
            copy_transposed(joint.graph)
        Rewrite()(joint.graph)
        joint.graph.lint()
        joint.recompile()
        return default_partition(joint, inputs, **options)

    table = select_decomp_table()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition, decompositions=table)
    monkeypatch.setitem(ENGINES, "compile", Compile(backend))  # type: ignore[arg-type]
    yield seen
    torch._dynamo.reset()


def copy_transposed(graph: Graph) -> None:
    """Copy what is given to a convolution with its first two dimensions exchanged."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        kernel = node.args[1]
        if kernel.target in (aten.permute.default, aten.slice.Tensor):
            with graph.inserting_before(node):
                copied = graph.call_function(aten.clone.default, (kernel,), {"memory_format": torch.contiguous_format})
            copied.meta["val"] = kernel.meta["val"].clone(memory_format=torch.contiguous_format)
            node.replace_input_with(kernel, copied)


def gradients(model: nn.Module, x: Tensor, y: Tensor, engine: str) -> list[Tensor]:
    model.zero_grad()
    out = curvature(model, x, y, h=0.7, engine=engine)
    (out.loss + out.penalty).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def image_sized(graph: Graph) -> list[Node]:
    """Convolutions whose kernel, and weight gradients that are, larger than any layer's here.

    Those of the grouped layer, 2 to 3 channels each, are cut after they are joined.
    """

    def larger(weight: Tensor | None) -> bool:
        return weight is not None and max(weight.shape[2:]) > (4 if weight.shape[:2] == (3, 2) else 3)

    convolutions = graph.find_nodes(op="call_function", target=aten.convolution.default)
    backwards = graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    found = [node for node in convolutions if larger(node.args[1].meta["val"])]
    return [*found, *(node for node in backwards if larger(node.meta["val"][1]))]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "no-bias": lambda: nn.Conv2d(4, 6, (3, 2), bias=False),
    "stride-drops-a-row": lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), dilation=(2, 3)),
    "grouped": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, stride=2),
}


class Branches(nn.Module):
    """Each of the layers on the same features: one compilation for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Conv2d(2, 4, 3, padding=1), nn.ModuleDict({name: f() for name, f in LAYERS.items()})
        features = {name: layer(torch.rand(1, 4, 12, 13)).numel() for name, layer in self.layers.items()}
        self.heads = nn.ModuleDict({name: nn.Linear(count, 3) for name, count in features.items()})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return torch.stack([self.heads[name](self.layers[name](x).relu().flatten(1)) for name in LAYERS]).sum(0)


def test_every_geometry_is_exact_and_keeps_no_image_sized_kernel(graphs: list[Graph]) -> None:
    torch.manual_seed(0)
    model = Branches().double()
    x, y = torch.rand(3, 2, 12, 13).double(), torch.tensor([0, 2, 1])
    ours, truth = (gradients(model, x, y, engine) for engine in ("compile", "reference"))
    for (name, _), gradient, wanted in zip(model.named_parameters(), ours, truth, strict=True):
        assert relative(gradient, wanted) < 1e-10, name
    assert len(graphs) == 2
    assert not [node for graph in graphs for node in image_sized(graph)]


def test_a_residual_network(graphs: list[Graph]) -> None:
    """Exact, with the arithmetic of the eager engine, counted on the graphs, and no truth values."""
    model, x, y = resnet8().double(), torch.rand(2, 3, 32, 32).double(), torch.tensor([1, 2])
    assert relative(gradients(model, x, y, "compile"), gradients(model, x, y, "reference")) < 1e-10

    with torch.no_grad(), FlopCounter() as forward:
        model(x)
    nodes = [node for graph in graphs for node in graph.nodes]
    assert 11.0 < sum(map(_flops, nodes)) / forward.total <= 12.4
    assert any(node.target is aten.sign.default for node in graphs[1].nodes)
    masks = [node for node in nodes if node.target is aten.le.Scalar]
    assert not [node for node in masks if node.meta["val"].dim() == 4]


def test_a_residual_network_in_training_mode(graphs: list[Graph]) -> None:
    """A share of the batch, the loss at the step: exact, at 12 F for half of it and 5 F for the other."""
    torch.manual_seed(0)
    model, x, y = resnet8().double().train(), torch.rand(4, 3, 32, 32).double(), torch.tensor([1, 2, 0, 3])
    found = []
    for engine in ("compile", "reference"):
        model.zero_grad()
        CURE(model, 0.7, engine=engine, batch_stats="train", fraction=0.5, loss_at="step")(x, y).total.backward()
        found.append([p.grad for p in model.parameters()])
    assert relative(*found) < 1e-10

    with torch.no_grad(), FlopCounter() as forward:
        model.eval()(x)
    assert len(graphs) == 4  # forward and backward of both parts
    nodes = [node for graph in graphs for node in graph.nodes]
    assert 8.0 < sum(map(_flops, nodes)) / forward.total <= (12.4 + 5.1) / 2


def _flops(node: Node) -> int:
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0

    def value(item: Any) -> Any:
        return item.meta["val"] if isinstance(item, Node) else item

    args = torch.utils._pytree.tree_map(value, node.args, is_leaf=lambda item: isinstance(item, Node))
    return int(count(*args, out_val=node.meta["val"]))


def test_a_where_of_the_models_own_stays_what_it_is(graphs: list[Graph]) -> None:
    """As a product with a mask it would be NaN, where the logarithm is."""

    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x <= 0, 0.0, torch.log(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), Logarithm(), nn.Linear(6, 3)).double()
    x, y = torch.rand(4, 2, 2, 2).double(), torch.tensor([0, 2, 1, 0])
    with torch.no_grad():
        assert (model[1](x.flatten(1)) < 0).any()
    out = curvature(model, x, y, h=0.01, engine="compile")
    assert torch.allclose(out.logits, curvature(model, x, y, h=0.01, engine="reference").logits)
