"""What all operators share: the choice of backend, lazy imports, metadata, compilation, error messages."""

import os
import subprocess
import sys

import fastcure_kernels as fk
import pytest
import torch

OPERATORS = {  # public name -> call on tensors shaped and laid out as the argument
    "bias_relu": lambda x: fk.bias_relu(x - 0.5, x[0, :, 0, 0], x - 0.1),
    "difference_sqnorm": lambda x: fk.difference_sqnorm(x, x + 1),
    "direction": fk.direction,
    "direction_step": lambda x: fk.direction_step(x, x - 0.5, 0.3),
    "l2_step": lambda x: fk.l2_step(x, x - 0.5, x + 0.01, 0.2, 0.1),
    "linf_step": lambda x: fk.linf_step(x, x - 0.5, x + 0.01, 0.2, 0.1),
}
EACH = pytest.mark.parametrize("name", OPERATORS)


def images(device="cpu"):
    return torch.rand(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)


def python(code, **environment):
    """Run code in a fresh interpreter that knows nothing of this one's triton."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "FASTCURE"))}
    run = [sys.executable, "-W", "error", "-c", code]
    path = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        run, env={**inherited, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_all_operators_are_here():
    assert sorted(OPERATORS) == fk.__all__


def test_import_loads_neither_triton_nor_dynamo():
    loaded = python("import sys, fastcure_kernels; print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
import fastcure_kernels as fk
x = torch.rand(2, 7, requires_grad=True)
fk.difference_sqnorm(x, fk.direction_step(x, x - 0.5, 0.3)).sum().backward()
fk.bias_relu(x, x[0], x).sum().backward()
fk.l2_step(x, fk.direction(x), x, 0.2, 0.1)
fk.linf_step(x, x, x, 0.2, 0.1)
import os
os.environ["FASTCURE_BACKEND"] = "triton"
try:
    fk.linf_step(x, x, x, 0.2, 0.1)
except RuntimeError as error:
    print(error)
"""
    assert "install it" in python(code)


def test_triton_on_cpu_wants_the_interpreter(monkeypatch):
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        fk.direction_step(images(), images(), 0.3)


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("FASTCURE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be auto, torch or triton, got 'cuda'"):
        fk.direction_step(images(), images(), 0.3)


@EACH
@pytest.mark.parametrize("choice", [None, "auto"])
def test_auto_the_default_takes_the_reference_implementation_on_cpu(monkeypatch, name, choice):
    monkeypatch.delenv("FASTCURE_BACKEND", raising=False)
    if choice:
        monkeypatch.setenv("FASTCURE_BACKEND", choice)
    with torch.autograd.profiler.profile() as profile:
        OPERATORS[name](images())
    assert not [event.name for event in profile.function_events if "fastcure::" in event.name]


@EACH
def test_fake_tensors_have_the_metadata_of_real_ones(device, name):
    x = images(device)
    for operand in (x, x.half(), x.transpose(0, 3), x[..., ::2]):
        real = OPERATORS[name](operand)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = OPERATORS[name](mode.from_tensor(operand))
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at it
@pytest.mark.parametrize("need", ["autograd", "none"])
def test_opcheck(triton_device, need):
    x, grad, adv = (images(triton_device) for _ in range(3))
    w = torch.rand(2, device=triton_device)
    per_sample = torch.tensor(0.3, device=triton_device).expand(2)
    mask = torch.randint(256, (x.numel() // 8,), device=triton_device).byte()
    ops = torch.ops.fastcure
    checks = {
        ops.gated_sum: (mask, False, grad, adv, adv[0, :, 0, 0].contiguous()),
        ops.gated_sum_and_mask: (False, grad, adv, adv[0, :, 0, 0].contiguous()),
        ops.direction_step: (x, grad, per_sample),
        ops.difference_sqnorm: (x, grad),
        ops.difference_sqnorm_backward: (x, grad, w, True, False),
        ops.linf_step: (adv, grad, x, w, per_sample, 0.0, 1.0),
        ops.l2_step: (adv, grad, x, w, per_sample, 0.0, 1.0),
    }
    if need == "autograd":
        checks = {ops.difference_sqnorm: (x.requires_grad_(), grad.requires_grad_())}
    for op, arguments in checks.items():
        torch.library.opcheck(op.default, arguments)


@EACH
def test_compiles_whole(device, name):
    x = images(device)
    expected = OPERATORS[name](x)
    torch._dynamo.reset()
    actual = torch.compile(OPERATORS[name], backend="aot_eager", fullgraph=True, dynamic=False)(x)
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected)


def test_compiled_gradient(device):
    a, b = (images(device).requires_grad_() for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(fk.difference_sqnorm, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled(a, b).sum().backward()
    torch.testing.assert_close(a.grad, 2 * (a - b).detach())
    torch.testing.assert_close(b.grad, -a.grad)


X = torch.rand(2, 6)
MISTAKES = {
    "integers": (lambda: fk.direction_step(X.long(), X, 0.3), "x must be float32, .* got torch.int64"),
    "0-dim": (lambda: fk.direction(X[0, 0]), "grad must have a batch dimension"),
    "shapes": (lambda: fk.difference_sqnorm(X, X[:, :1]), r"b must have the shape \(2, 6\) of a, got \(2, 1\)"),
    "devices": (lambda: fk.linf_step(X, X.to("meta"), X, 0.1, 0.1), "grad must be on the device cpu of adv"),
    "length": (lambda: fk.direction_step(X, X, torch.ones(3)), r"h must be .*\(2,\), got \(3,\)"),
    "a column of lengths": (lambda: fk.direction_step(X, X, torch.ones(2, 1)), r"h must be .*\(2,\), got \(2, 1\)"),
    "linf_step's radii": (lambda: fk.linf_step(X, X, X, 0.1, torch.ones(3)), r"eps must be .*\(2,\), got \(3,\)"),
    "linf_step's steps": (lambda: fk.linf_step(X, X, X, torch.ones(3), 0.1), r"step_size must be .*got \(3,\)"),
    "l2_step's radii": (lambda: fk.l2_step(X, X, X, 0.1, torch.ones(3)), r"eps must be .*\(2,\), got \(3,\)"),
    "l2_step's steps": (lambda: fk.l2_step(X, X, X, torch.ones(3), 0.1), r"step_size must be .*got \(3,\)"),
    "one length for several": (lambda: fk.direction_step(X, X, torch.ones(1)), r"h must be .*\(2,\), got \(1,\)"),
    "its device": (lambda: fk.linf_step(X, X, X, 0.1, torch.ones(2, device="meta")), "eps must be on the device cpu"),
    "bounds": (lambda: fk.l2_step(X, X, X, 0.1, 0.1, 1.0, 0.0), "lower must be <= upper, got 1.0 and 0.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(TypeError if mistake == "integers" else ValueError, match=message):
        call()
