"""How long a run still takes, by its passes."""

from fastcure.training.checkpoint import Progress
from fastcure.training.eta import Eta, passes_of
from fastcure.training.settings import make_settings


def test_the_time_that_is_left_is_by_the_passes_that_are_left() -> None:
    settings = make_settings({"dataset": "npz:a", "pretrain_epochs": 2, "epochs": 3, "eps": (0.1, 0.2)})
    passes = passes_of(settings, train=100, validation=10, test=20)
    assert passes == (300 + 220, 1200 + 220, 20 * 43)  # CURE's step costs 12 passes, a standard one 3
    begun = Progress(data=0, phase="pretrain", epoch=1, step=1)
    assert passes.left(settings, begun, steps=2) == 520 / 2 + 3 * 1420 + 2 * 860
    begun = Progress(data=0, phase="finetune", epoch=2)
    assert passes.left(settings, begun, steps=2) == 1420 + 860
    now = [10.0]
    eta = Eta(1000.0, lambda: now[0])
    assert str(eta) == ""
    for later, made, words in ((15, 100, "45 s left"), (610, 100, "40 min left"), (30010, 200, "12 h 30 min left")):
        now[0] = later
        eta.made(made)
        assert str(eta) == words
    assert eta.seconds == 30000 * 600 / 400
