"""The second-order rule of attention, against its definition in float64."""

import torch
from torch.nn import functional as F

from fastcure import double_backward


def test_what_a_boolean_mask_leaves_out_has_no_weight() -> None:
    q = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    with double_backward():
        found = F.scaled_dot_product_attention(q, q, q, mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, mask))
