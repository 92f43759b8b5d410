"""A canary for each private name of torch's that the package uses: a failure says what broke when torch moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from canaries import breaks
from fastcure_kernels.waiting import Waiting
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import fastcure._torch_compat as compat

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of torch's own files


@breaks("batch_stats='train' would miss a batch norm; dropout left out would not be warned of")
def test_norms_and_dropout_have_their_bases() -> None:
    norms = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d]
    assert all(issubclass(kind, compat.BatchNormBase) for kind in norms)
    assert not issubclass(nn.InstanceNorm2d, compat.BatchNormBase)
    dropouts = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
    assert all(issubclass(kind, compat.DropoutBase) for kind in dropouts)


@breaks("a compiled model would not be differentiated twice; checkpoints of wrapped models would not be read")
def test_wrappers_have_their_attributes() -> None:
    model = nn.Linear(2, 2)
    assert compat.uncompiled(torch.compile(model)) is model
    assert compat.uncompiled(model) is model
    source = Path(torch.distributed.__file__).parent
    texts = "".join((source / name).read_text() for name in ("fsdp/_common_utils.py",))
    texts += (source / "algorithms/_checkpoint/checkpoint_wrapper.py").read_text()
    for name in compat.WRAPPER_ATTRIBUTES[1:]:
        assert f'"{name}"' in texts
    assert compat.FSDP_ATTRIBUTE in compat.WRAPPER_ATTRIBUTES


@breaks("folding would lose the padding mode, leave out layers without a bias, or pass over a method of an instance")
def test_convolutions_run_with_other_weights_in_every_padding_mode() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    x, weight = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 3, 3)
    wanted = F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight)
    torch.testing.assert_close(compat.convolve(layer, x, weight, None), wanted)
    assert {*compat.registered_parameters(nn.Linear(2, 2, bias=False))} == {"weight", "bias"}
    assert hasattr(nn.Conv2d, compat.PARTS_OF_FORWARD[0])
    assert hasattr(nn.BatchNorm2d, compat.PARTS_OF_FORWARD[1])


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
@pytest.mark.parametrize("everywhere", [False, True])
@breaks("folding would pass a hook by")
def test_hooks_are_seen(register: str, everywhere: bool) -> None:
    module = nn.Linear(2, 2)
    assert not compat.has_hooks(module)
    on: object = module
    if everywhere:
        on, register = nn.modules.module, register.replace("register_", "register_module_")
    handle = getattr(on, register)(lambda *_: None)
    try:
        assert compat.has_hooks(module)
    finally:
        handle.remove()


@breaks("gradients that are not averaged would go unseen (tests/distributed has the whole)")
def test_distributed_data_parallel_has_what_is_asked_of_it() -> None:
    assert DistributedDataParallel._active_ddp_module is None
    assert compat.active_ddp() is None
    source = Path(nn.parallel.distributed.__file__).read_text()
    for line in ("self._module_parameters = [", "self._use_python_reducer ="):
        assert line in source


@breaks("a pending sum would be computed as soon as its shape is asked for; modes of the caller would be passed by")
def test_functions_of_torch_pass_subclasses_by() -> None:
    class Loud(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError

        __torch_dispatch__ = __torch_function__

    modes = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            modes.append(func)
            return func(*args, **(kwargs or {}))

    x = compat.without_storage(Loud, torch.ones(2, 3).T)
    with Mode(), compat.without_torch_function():
        assert x.size() == (3, 2)
    assert modes


@pytest.mark.parametrize("strides", [False, True])
@breaks("a change in place of a pending sum would go unseen")
def test_tensors_have_no_memory_but_shape_dtype_and_strides(strides: bool) -> None:
    seen = []

    class Shape(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append((compat.operator_name(func), compat.is_in_place(func)))
            return args[0]

    x = compat.without_storage(Shape, torch.ones(2, 3, dtype=torch.float16).T, strides)
    assert (x.shape, x.dtype, x.stride()) == ((3, 2), torch.float16, (1, 3) if strides else (2, 1))
    x.add(x)
    x.add_(x)
    assert seen == [("add", False), ("add_", True)]


@breaks("no FLOPs would be counted; a view would count as traffic")
def test_operators_are_counted_at_the_dispatcher() -> None:
    calls = []

    class Counter(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((compat.operator_packet(func), func))
            return func(*args, **(kwargs or {}))

    with Counter():
        torch.ones(2, 3) @ torch.ones(3, 4)
        torch.ones(2, 2, 3) @ torch.ones(3, 4)
    assert torch.ops.aten.mm in [packet for packet, _ in calls]
    assert compat.unsafe_view in [func for _, func in calls]


@breaks("norms that wait would be computed at once, or written to unseen")
def test_a_subclass_leaves_functions_alone_and_operators_tell_what_they_write() -> None:
    seen = []

    class Below(Waiting):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append([compat.operator_name(func), *compat.written_arguments(func, args, kwargs or {})])
            return torch.ones(2)

    x, y = compat.without_storage(Below, torch.ones(2)), torch.zeros(2)
    assert type(torch.nn.functional.relu(x)) is torch.Tensor
    torch.add(x, x, out=y)
    x.add_(x)
    assert seen[0] == ["relu"]
    assert seen[1][0] == "add"
    assert seen[1][1] is y
    assert seen[2][0] == "add_"
    assert seen[2][1] is x


@breaks("tensors within lists and dicts would be passed over")
def test_trees_are_walked() -> None:
    tree = {"a": [1, (2, None)], "b": 3}
    assert compat.tree_leaves(tree) == [1, 2, None, 3]
    assert compat.tree_map(lambda leaf: leaf and leaf + 1, tree) == {"a": [2, (3, None)], "b": 4}


@breaks("attention would have no second derivative, or a wrong one")
def test_attention_has_its_plain_operator() -> None:
    q, k, v = torch.rand(3, 1, 2, 4, 8, dtype=torch.float64).requires_grad_()
    out, weights = compat.math_attention(q, k, v, None, 0.0, True)
    assert weights.shape == (1, 2, 4, 4)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert torch.autograd.gradgradcheck(
        lambda q: compat.math_attention(q, k.detach(), v.detach())[0], q.detach().requires_grad_()
    )


@pytest.mark.parametrize("name", ["hardsigmoid", "hardswish"])
@breaks("hardsigmoid or hardswish would be given torch's second derivative, of which there is none")
def test_modes_see_the_functions_that_have_no_second_derivative(name: str) -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        getattr(nn, name.replace("hards", "Hards"))()(torch.ones(2))
    assert {getattr(F, name), getattr(compat, f"{name}_in_c")} & {*seen}


@breaks("gradients of parts of a batch, and copies of buffers, would be wrong")
def test_lists_of_tensors_are_copied_and_added() -> None:
    a, b = [torch.ones(2), torch.zeros(3)], [torch.arange(2.0), torch.arange(3.0)]
    added = compat.foreach_add(a, b)
    assert [t.tolist() for t in added] == [[1, 2], [0, 1, 2]]
    compat.foreach_copy(a, b)
    assert all(map(torch.equal, a, b))


@breaks("a replayed step would pass by modes and hooks of saved tensors")
def test_who_listens_is_known() -> None:
    assert not compat.somebody_listens()
    with TorchFunctionMode():
        assert compat.somebody_listens()
    with compat.TorchDispatchMode():
        assert compat.somebody_listens()
    with torch.autograd.graph.save_on_cpu():
        assert compat.somebody_listens()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert compat.somebody_listens()
    handle.remove()
    assert not compat.somebody_listens()
