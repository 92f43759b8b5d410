"""Training loops of one's own in several processes: each is right, or one error, and never ranks that drift apart."""

from typing import Any

import pytest
from own_loops import GAMMA, loops
from run_example import EXAMPLES, weights
from two_processes import in_two_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_two_processes(loops, str(tmp_path_factory.mktemp("store") / "store"))


@pytest.mark.parametrize(
    "name",
    [
        "averaged by hand",
        "averaged by hand, no_sync",
        "inside a trainer",
        "beside an unrelated one",
        "through its wrapper, forward of its class",
        "through its wrapper, forward of its own",
    ],
)
def test_right_loops_are_left_alone(found: dict[str, Any], name: str) -> None:
    assert found[name] < 1e-10


def test_a_penalty_beside_its_models_wrapper_is_refused(found: dict[str, Any]) -> None:
    beside = [name for name in found if name.startswith(("beside, ", "a part"))]
    assert len(beside) == 8
    for name in beside:
        assert found[name].startswith("RuntimeError: the model is in a DistributedDataParallel of 2 processes"), name
        assert "ddp = DistributedDataParallel(CURE(model))" in found[name]
        assert "no_sync()" in found[name]
    assert found["around it"].startswith(
        "TypeError: the model must have no DistributedDataParallel in it, got one at '1'"
    )
    assert found["looked at"] == [True, True]


def test_the_example_for_torchrun_gives_the_weights_of_one_process(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of a batch have another order in two processes: float32 rounding, and some growth over eight steps."""
    monkeypatch.syspath_prepend(EXAMPLES)
    one = weights("ddp_torchrun")
    assert (found["example"] - one).norm() <= 1e-5 * one.norm()


def test_settings_on_a_wrapper_are_refused(found: dict[str, Any]) -> None:
    said = found["refused settings"]
    assert said.pop("the same value, and a name that is no setting") == "nothing"
    assert len(said) == 9
    for name, words in said.items():
        assert words.startswith(f"ValueError: {name} was set to"), name
        assert f"wrapper.module.{name} = " in words
    assert (
        f"set to 0.0 on the DistributedDataParallel around CURE, where it has no effect; CURE has {GAMMA}"
        in (said["gamma"])
    )
    assert found["gamma of what is sharded"] == 0
