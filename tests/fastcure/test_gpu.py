"""The penalty and the attacks on a CUDA device, against the float64 reference on the CPU."""

import copy
from typing import Any

import pytest
import torch
from networks import NETWORKS, make, relative

from fastcure import CURE, curvature
from fastcure.attacks import pgd

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("options", [{}, {"batch_stats": "train"}, {"loss_at": "step"}], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_penalty_on_the_device_equals_the_reference(
    name: str, dtype: torch.dtype, tolerance: float, options: dict[str, Any]
) -> None:
    case = make(NETWORKS[name], 6, seed=0)
    z = torch.randn_like(case.x) / case.x[0].numel() ** 0.5
    truth = curvature(*case, engine="reference", direction=z, **options)
    (truth.loss + truth.penalty).sum().backward()
    model = copy.deepcopy(case.model).to("cuda", dtype)
    model.zero_grad()
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        out = curvature(model, case.x.to("cuda", dtype), case.y.cuda(), direction=z.to("cuda", dtype), **options)
        (out.loss + out.penalty).sum().backward()
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    assert relative(out.penalty.cpu(), truth.penalty) < tolerance
    wanted = [p.grad for p in case.model.parameters()]
    assert relative([p.grad.cpu() for p in model.parameters()], wanted) < tolerance


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_training_step_lowers_the_total(channels_last: bool, amp: torch.dtype | None) -> None:
    case = make(NETWORKS["resnet8"], 16, seed=0, dtype=torch.float32)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model, x, y = case.model.cuda(), case.x.cuda().contiguous(memory_format=layout), case.y.cuda()
    cure, optimizer = CURE(model, gamma=0.1), torch.optim.SGD(model.parameters(), 3e-2)
    totals = []
    for _ in range(20):
        with torch.autocast("cuda", amp, enabled=amp is not None):
            out = cure(x, y)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        totals.append(float(out.total.detach()))
    assert totals[-1] < 0.9 * totals[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_on_the_device_equals_pgd_on_the_cpu(norm: str) -> None:
    case = make(NETWORKS["mlp-softplus"], 8, seed=0)
    on_cpu = pgd(*case, eps=0.1, norm=norm, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(case.model).cuda()
    seeded = torch.Generator().manual_seed(0)
    on_device = pgd(model, case.x.cuda(), case.y.cuda(), eps=0.1, norm=norm, generator=seeded)
    assert relative(on_device.cpu(), on_cpu) < 1e-6
