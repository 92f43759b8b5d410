"""Graph passes of the compile engine: what torch's rules and inductor would make slow, written otherwise.

Weight gradients. The compiled counterpart of `fastcure.rules.convolution`: torch's double backward of a convolution is

    gW[co, ci, k] = sum over n, o of v[n, ci, stride o + dilation k - padding] g[n, co, o]

as `convolution(v^T, g^T, stride=dilation, dilation=stride)^T`, cut to the size of W, where ^T exchanges the first two
dimensions: its kernel is as large as the image. That is the weight gradient of a convolution of `v` under `g`, whatever
`v` and `g` are, wherever the sizes are those of a convolution.

Masks of ReLU. On the CPU inductor stores and loads the truth values of `y <= 0` one by one, at twenty times the price
of the arithmetic around them; a mask of 0.0 and 1.0, and a product, stay in vectors.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from fastcure._torch_compat import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten
PARTS = (aten.slice.Tensor, aten.clone.default)
"""What may stand around an exchange of dimensions: the share of a group, and the copy that torch makes on CUDA."""


class Rewrite(CustomGraphPass):
    """Both passes, as inductor takes them."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite a joint graph in place."""
        for node in graph.nodes:
            if _is_weight_gradient(node):
                last, value = _cut(node)
                if _sizes_fit(node, value):
                    _write_weight_gradient(graph, node, last, value)
            elif _is_relu_mask(node):
                _write_relu_mask(graph, node)
        graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        """Tell inductor's cache when a pass has changed."""
        return get_hash_for_files((__file__,))


def _is_weight_gradient(node: Node) -> bool:
    """Tell a convolution whose kernel is made of g^T."""
    if node.target is not aten.convolution.default or node.args[2] is not None or node.args[6] or node.args[8] != 1:
        return False
    kernel = node.args[1]
    while isinstance(kernel, Node) and kernel.target in PARTS:
        kernel = kernel.args[0]
    return isinstance(kernel, Node) and _exchanges(kernel)


def _cut(node: Node) -> tuple[Node, Any]:
    """Return the node that is gW, and its value: without groups, the cut to the size of W follows, if there is any."""
    last, value = node, node.meta["val"].transpose(0, 1)
    cut = _only_user(node)
    if cut is not None and _exchanges(cut):
        while cut is not None and (cut.target in PARTS or last is node):
            last, value, cut = cut, cut.meta["val"], _only_user(cut)
    return last, value


def _sizes_fit(node: Node, weight: Any) -> bool:
    """Tell whether a convolution of `v` with a kernel of the size of `weight` gives what has the size of `g`."""
    v, g, _, dilation, padding, stride, *_ = node.args
    sizes: Any = (v.meta["val"].shape[2:], g.meta["val"].shape[2:], weight.shape[2:], stride, padding, dilation)  # type: ignore[union-attr]
    return all((n + 2 * p - d * (k - 1) - 1) // s + 1 == m for n, m, k, s, p, d in zip(*sizes, strict=True))


def _write_weight_gradient(graph: Graph, node: Node, last: Node, value: Any) -> None:
    v, g, _, dilation, padding, stride, *_ = node.args
    with graph.inserting_before(last):

        def exchanged(tensor: Any) -> Node:
            value = tensor.meta["val"].transpose(0, 1)
            return _call(graph, aten.permute.default, (tensor, [1, 0, *range(2, value.dim())]), value)

        weight = torch.empty_like(value, memory_format=torch.contiguous_format)
        options = {"dtype": value.dtype, "device": value.device}
        like = _call(graph, aten.empty.memory_format, (list(value.shape),), weight, **options)
        geometry = (stride, padding, dilation, False, [0 for _ in weight.shape[2:]], 1)
        args = (exchanged(g), exchanged(v), like, None, *geometry, [False, True, False])
        gradients = _call(graph, aten.convolution_backward.default, args, (None, weight, None))
        new = _call(graph, operator.getitem, (gradients, 1), weight)
        new = exchanged(new) if last is node else new
    last.replace_all_uses_with(new)


def _is_relu_mask(node: Node) -> bool:
    """Tell the derivative of a ReLU, `where(y <= 0, 0, g)`, on the CPU; a `where` of the model's stays what it is."""
    if node.target is not aten.where.self or node.meta["val"].device.type != "cpu":
        return False
    if str(node.meta.get("original_aten")) != "aten.threshold_backward.default":  # a deep copy of it, in the meta
        return False
    mask, zero, _ = node.args
    return (
        isinstance(mask, Node)
        and isinstance(zero, Node)
        and (mask.target, mask.args[1:]) == (aten.le.Scalar, (0,))
        and (zero.target, zero.args) == (aten.scalar_tensor.default, (0,))
    )


def _write_relu_mask(graph: Graph, node: Node) -> None:
    mask: Any = node.args[0]
    y, value = mask.args[0], node.meta["val"]
    with graph.inserting_before(node):
        sign = _call(graph, aten.sign.default, (y,), y.meta["val"])
        one = _call(graph, aten.clamp_min.default, (sign, 0), y.meta["val"])
        new = _call(graph, aten.mul.Tensor, (node.args[2], one), value)
    node.replace_all_uses_with(new)


def _exchanges(node: Node) -> bool:
    """Tell whether a node exchanges the first two dimensions; inductor writes it as a permutation."""
    if node.target is not aten.permute.default:
        return False
    order: Any = node.args[1]
    return order == [1, 0, *range(2, len(order))]


def _call(graph: Graph, function: Any, args: tuple[Any, ...], value: Any, **options: Any) -> Node:
    node = graph.call_function(function, args, options)
    node.meta["val"] = value
    return node


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
