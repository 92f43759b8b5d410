"""The reference implementation: CURE's definitions by plain double backpropagation, one line each. Nobody tunes it.

Every quantity is computed on its own, nothing is shared, and autograd differentiates the result; the fast
engines are checked against this file. Moosavi-Dezfooli et al., CVPR 2019, equations 8 to 10.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def curvature(
    loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    y: Tensor,
    h: float | Tensor,
    *,
    power: int = 2,
    direction: Tensor | None = None,
    loss_at: str = "x",
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, loss and penalty of each sample, with an ordinary autograd graph behind them.

    Args:
        loss_of: `(x, y) -> (logits (B, C), loss (B,))`, the model in evaluation mode.
        x: `(B, ...)` images.
        y: labels, as the loss takes them.
        h: L2 length of the finite step, in input units; a number or `(B,)`.
        power: 2 for the squared norm, 1 for the norm itself.
        direction: `(B, ...)` in place of z.
        loss_at: "x", or "step" for the loss at x + h z.

    Returns:
        `(logits (B, C), loss (B,), penalty (B,))`.

    Examples:
        >>> import torch
        >>> from fastcure.reference import curvature
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> def loss_of(x, y):
        ...     logits = model(x)
        ...     return logits, torch.nn.functional.cross_entropy(logits, y, reduction="none")
        >>> logits, loss, penalty = curvature(loss_of, x, y, h=1.0)
        >>> penalty.shape
        torch.Size([5])
    """

    def gradient(point: Tensor) -> Tensor:  # g(x) = d l / d x, of the batch's sum
        point = point.detach().requires_grad_()
        return torch.autograd.grad(loss_of(point, y)[1].sum(), point, create_graph=True)[0]

    logits, loss = loss_of(x, y)
    z = unit_sign(gradient(x).detach()) if direction is None else direction
    length = torch.as_tensor(h, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))
    if loss_at == "step":
        _, loss = loss_of(x + length * z, y)
    d = gradient(x + length * z) - gradient(x)
    penalty = d.square().flatten(1).sum(1)
    if power == 1:
        zero = penalty == 0  # the derivative of the norm at 0 is taken as 0, where autograd's is NaN
        penalty = torch.where(zero, 0.0, torch.where(zero, 1.0, penalty).sqrt())
    return logits, loss, penalty


def unit_sign(g: Tensor) -> Tensor:
    """Return `z = sign(g) / ||sign(g)||_2` of each sample `(B, ...)`: zero where g is zero, NaN where g is NaN.

    Examples:
        >>> import torch
        >>> from fastcure.reference import unit_sign
        >>> unit_sign(torch.tensor([[3.0, -2.0, 1.0, 5.0]]))
        tensor([[ 0.5000, -0.5000,  0.5000,  0.5000]])
    """
    sign = torch.where(g.isnan(), g, g.sign())
    norm = sign.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.dim() - 1))
    return torch.where(norm == 0, 0.0, sign / norm)
