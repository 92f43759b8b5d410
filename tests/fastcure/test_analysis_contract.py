"""What all measures of curvature promise: the model comes back as it was, chunks change nothing, errors are clear."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from networks import NETWORKS, Case, make
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.analysis import curvature_along_gradient, curvature_profile, frobenius_norm, robustness_bounds

Measure = Callable[..., tuple[Tensor, ...]]


def frobenius(*args: object, **options: object) -> tuple[Tensor, ...]:
    return frobenius_norm(*args, probes=13, generator=torch.Generator().manual_seed(0), **options)  # type: ignore[arg-type]


MEASURES: dict[str, Measure] = {
    "profile": curvature_profile,
    "extremes": partial(curvature_profile, k=3),
    "frobenius": frobenius,
    "along": curvature_along_gradient,
}
MEASURES |= {f"{name}-finite": partial(measure, method="finite", h=0.5) for name, measure in MEASURES.items()}
MEASURES |= {"bounds": robustness_bounds, "margins": partial(robustness_bounds, kind="margin")}


def but(*names: str) -> pytest.MarkDecorator:
    """Every measure but these."""
    chosen = {name: measure for name, measure in MEASURES.items() if name not in names}
    return pytest.mark.parametrize("measure", chosen.values(), ids=chosen)


every_measure = but()


@pytest.fixture
def case() -> Case:
    made = make(NETWORKS["batch_norm-gelu-average"], 3, seed=0)
    return made._replace(x=made.x[..., :4, :4], model=nn.Sequential(*list(made.model)[:-1], nn.Linear(12, 7).double()))


@every_measure
def test_the_model_comes_back_as_it_was(case: Case, measure: Measure) -> None:
    case.model[1].eval()
    case.model[0].weight.requires_grad_(False)
    case.model[4].weight.grad = torch.ones_like(case.model[4].weight)
    flags = [m.training for m in case.model.modules()]
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    wanted = [p.requires_grad for p in case.model.parameters()]
    grads = [p.grad is None for p in case.model.parameters()]
    x, random = case.x.clone(), torch.get_rng_state()
    out = measure(*case)
    assert not any(value.requires_grad for value in out)
    assert [m.training for m in case.model.modules()] == flags
    assert [p.requires_grad for p in case.model.parameters()] == wanted
    assert [p.grad is None for p in case.model.parameters()] == grads
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())
    assert torch.equal(case.x, x)
    assert torch.equal(torch.get_rng_state(), random)  # a measure between two epochs leaves training alone
    with torch.no_grad():
        torch.testing.assert_close(measure(*case), out)


@every_measure
def test_everything_comes_back_after_an_exception(case: Case, measure: Measure) -> None:
    if measure is MEASURES["margins"]:
        case.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("from the loss")))

    def fails(logits: Tensor, y: Tensor) -> Tensor:
        raise KeyError("from the loss")

    flags = [m.training for m in case.model.modules()]
    with pytest.raises(KeyError, match="from the loss"):
        measure(*case, loss_fn=fails)
    assert [m.training for m in case.model.modules()] == flags


@every_measure
def test_chunks_change_nothing_and_bound_the_batch(case: Case, measure: Measure) -> None:
    wanted = measure(*case)
    for chunk_size in (1, 2, 7, 10_000):
        batches: list[int] = []
        handle = case.model.register_forward_pre_hook(lambda _, inputs, seen=batches: seen.append(len(inputs[0])))
        found = measure(*case, chunk_size=chunk_size)
        handle.remove()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
        assert max(batches) <= chunk_size
        assert chunk_size < 10_000 or max(batches) >= 3 or measure is MEASURES["extremes-finite"]


@but("frobenius", "frobenius-finite")  # their probes are random
def test_a_batch_gives_what_its_samples_give_alone(case: Case, measure: Measure) -> None:
    together = measure(*case)
    for i in range(3):
        alone = measure(case.model, case.x[i : i + 1], case.y[i : i + 1])
        torch.testing.assert_close(alone[0][0], together[0][i], rtol=1e-6, atol=1e-9)


@every_measure
def test_soft_targets_and_memory_formats(case: Case, measure: Measure) -> None:
    wanted = measure(*case)
    torch.testing.assert_close(measure(case.model, case.x, F.one_hot(case.y, 7).double()), wanted)
    strided = case.x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(measure(case.model, strided, case.y), wanted, rtol=1e-6, atol=1e-9)


@but("extremes-finite")  # depends on the space that was searched, and that on the dtype
def test_fp32_is_near_fp64(case: Case, measure: Measure) -> None:
    for narrow, wide in zip(measure(*case.copy(torch.float32)), measure(*case), strict=True):
        assert narrow.dtype == torch.float64
        scale = float(wide.abs().max())
        torch.testing.assert_close(narrow, wide, rtol=1e-3, atol=1e-3 * scale)


@every_measure
def test_progress_sees_every_sample(case: Case, measure: Measure) -> None:
    seen: list[slice] = []

    def progress(parts: list[slice]) -> list[slice]:
        assert len(parts) > 0  # tqdm shows how many there are
        seen.extend(parts)
        return parts

    measure(*case, chunk_size=1, progress=progress)
    assert seen == [slice(0, 1), slice(1, 2), slice(2, 3)]


@every_measure
def test_nan_is_an_error_that_names_the_sample(case: Case, measure: Measure) -> None:
    x = case.x.clone()
    x[2, 0, 0, 0] = torch.nan
    for chunk_size in (1, 256):
        with pytest.raises(FloatingPointError, match="curvature of sample 2 is not a finite number"):
            measure(case.model, x, case.y, chunk_size=chunk_size)


class Noisy(nn.Module):
    """A model that adds noise to its images, or to its logits."""

    def __init__(self, model: nn.Module, size: float, *, inside: bool) -> None:
        super().__init__()
        self.model, self.size, self.inside = model, size, inside

    def forward(self, x: Tensor) -> Tensor:
        if self.inside:
            return self.model(x + self.size * torch.randn_like(x))
        logits = self.model(x)
        return logits + self.size * torch.randn_like(logits)


@every_measure
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("size", [0.1, 1e-4])
def test_a_random_model_is_an_error_each_time(case: Case, measure: Measure, inside: bool, size: float) -> None:
    """Noise of 1e-4 in the images makes ||Hz|| of a step of 1e-3 as large as you like: no measure can bear it."""
    noisy = Noisy(case.model, size, inside=inside).double()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"random in evaluation mode: logits differ by .* two passes"):
            measure(noisy, case.x, case.y)


@every_measure
def test_random_numbers_that_change_nothing_are_allowed(case: Case, measure: Measure) -> None:
    torch.testing.assert_close(measure(Noisy(case.model, 0.0, inside=True), case.x, case.y), measure(*case))


@every_measure
def test_probabilities_are_warned_of_once_a_model(case: Case, measure: Measure) -> None:
    model = nn.Sequential(case.model, nn.Softmax(1))
    with pytest.warns(UserWarning, match="must return logits, got what look like probabilities") as seen:
        measure(model, case.x, case.y)
    assert [warning.filename for warning in seen] == [__file__]
    measure(model, case.x, case.y)


@but("margins")  # they have no loss_fn
def test_a_loss_of_ones_own_may_take_probabilities(case: Case, measure: Measure) -> None:
    def likelihood(p: Tensor, y: Tensor) -> Tensor:
        return -p.gather(1, y[:, None]).squeeze(1).log()

    model = nn.Sequential(case.model, nn.Softmax(1))
    torch.testing.assert_close(measure(model, case.x, case.y, loss_fn=likelihood), measure(*case), rtol=1e-6, atol=1e-9)


@every_measure
def test_pixels_outside_of_0_to_1_are_warned_of_once_a_model(case: Case, measure: Measure) -> None:
    with pytest.warns(UserWarning, match=r"pixels should be in \[0, 1\], got .*fastcure\.models\.Normalize") as seen:
        measure(case.model, 4 * case.x - 2, case.y)
    assert [warning.filename for warning in seen] == [__file__]
    measure(case.model, 4 * case.x - 2, case.y)


@every_measure
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_output_that_is_no_number_is_an_error(case: Case, measure: Measure, value: float) -> None:
    """Also of a network that is linear in x, whose curvature is 0 whatever its outputs are."""
    own = torch.arange(7) == case.y[1]

    class Broken(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(own, value, self.model(x))

    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 7)).double()
    for model in (case.model, linear):
        with pytest.raises(FloatingPointError, match="curvature of sample 0 is not a finite number"):
            measure(Broken(model), case.x[1:2], case.y[1:2])


def bad(**changes: object) -> dict[str, object]:
    return {"model": nn.Linear(6, 4), "x": torch.rand(2, 6), "y": torch.tensor([0, 3]), **changes}


FINITE_STEP = "h is the step of method='finite', and of that alone: got method="


@pytest.mark.parametrize(
    ("measure", "call", "error", "message"),
    [
        *[
            (measure, bad(**changes), error, message)
            for measure in (curvature_profile, frobenius_norm, curvature_along_gradient)
            for changes, error, message in (
                ({"method": "exakt"}, ValueError, "method must be 'exact' or 'finite', got 'exakt'"),
                ({"h": 1.0}, ValueError, FINITE_STEP + "'exact' with h=1.0"),
                ({"method": "finite"}, ValueError, FINITE_STEP + "'finite' with h=None"),
                ({"method": "finite", "h": -1.0}, ValueError, "h must be > 0, got -1.0"),
                ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1, got 0"),
                ({"x": torch.rand(0, 6), "y": torch.zeros(0).long()}, ValueError, "at least one sample, got none"),
                ({"x": torch.ones(2, 6).byte()}, TypeError, "floating point"),
                ({"y": torch.tensor([0])}, ValueError, "one label for each of the 2 samples"),
                ({"y": torch.tensor([[0], [3]])}, ValueError, r"shape \(2,\), .* got \(2, 1\): pass y\.flatten\(\)"),
                (
                    {"y": torch.tensor([0.0, 3.0])},
                    ValueError,
                    r"whole numbers, .* got torch\.float32: pass y\.long\(\)",
                ),
                ({"y": torch.tensor([0, -1])}, ValueError, r"labels must be in 0\.\.3.* got -1\.\.0"),
                ({"y": torch.full((2, 3), 1 / 3)}, ValueError, r"shape of the logits \(\d+, 4\), got \(\d+, 3\)"),
                ({"y": torch.tensor([0, 4])}, ValueError, r"labels must be in 0\.\.3.* got 0\.\.4"),
                ({"loss_fn": F.cross_entropy}, ValueError, "use reduction='none'"),
                ({"model": torch.tanh}, TypeError, r"torch\.nn\.Module, got builtin"),
            )
        ],
        (curvature_profile, bad(k=0), ValueError, r"k must be in 1\.\.3, half of the 6 values of a sample, got 0"),
        (curvature_profile, bad(k=4), ValueError, "got 4"),
        (frobenius_norm, bad(probes=1), ValueError, "probes must be >= 2, for a standard error, got 1"),
        (robustness_bounds, bad(kind="logit"), ValueError, "kind must be 'loss' or 'margin', got 'logit'"),
        (robustness_bounds, bad(target=1), ValueError, "class of kind='margin', got 1 with kind='loss'"),
        (robustness_bounds, bad(threshold=torch.inf), ValueError, "threshold must be finite, got inf"),
        (robustness_bounds, bad(kind="margin", target=3), ValueError, "target must differ from y, got 3: name"),
        (robustness_bounds, bad(kind="margin", target=4), ValueError, r"target must be in 0\.\.3, got 4"),
        (robustness_bounds, bad(kind="margin", y=torch.tensor([0, 4])), ValueError, r"labels must be in 0\.\.3"),
        (robustness_bounds, bad(kind="margin", y=torch.tensor([[0], [3]])), ValueError, r"got \(2, 1\): pass y"),
        (robustness_bounds, bad(y=torch.tensor([[0], [3]])), ValueError, r"got \(2, 1\): pass y"),
        (robustness_bounds, bad(kind="margin", model=torch.tanh), TypeError, r"torch\.nn\.Module"),
    ],
)
def test_bad_input_is_one_clear_error(
    measure: Measure, call: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure(**call)


@but("margins")  # they have no loss
def test_a_loss_that_is_a_module_is_measured_in_evaluation_mode(measure: Measure) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modes = set[bool]()

        def forward(self, logits: Tensor, y: Tensor) -> Tensor:
            self.modes.add(self.training)
            return F.cross_entropy(logits, y, reduction="none")

    case, loss_fn = make(NETWORKS["mlp-softplus"], 3, seed=0), Loss()
    measure(case.model, case.x, case.y, loss_fn=loss_fn)
    assert loss_fn.modes == {False}
    assert loss_fn.training
