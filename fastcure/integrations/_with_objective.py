"""What the mixins have in common: an objective beside the network, and schedules of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from fastcure.objectives import Objective
from fastcure.objectives.base import refuse_parameters_beside
from fastcure.schedules import schedule


class WithObjective:
    """Has an objective that is made when it is first needed, and that is no submodule: a checkpoint does not hold it.

    It is made anew where the trainer has another network than before, or the module another than the objective's.

    Raises:
        NotImplementedError: if a subclass does not define `make_objective`.
        ValueError: if the objective has parameters of its own, such as those of a loss: nothing would train them.
        TypeError: if the objective keeps something of each sample, whose places these frameworks do not tell.
    """

    schedules: ClassVar[Mapping[str, str]] = {}
    """Numbers of the objective that change during the run: `{"gamma": "0:1x50%,1"}`, see `fastcure.schedule`."""

    def make_objective(self) -> Objective:
        """Return the objective of the network: define it."""
        raise NotImplementedError(
            f"{type(self).__name__} must define make_objective(self), such as "
            "return fastcure.CURE(self.model, h=fastcure.eps_to_h(8 / 255, 3 * 32 * 32))"
        )

    @property
    def objective(self) -> Objective:
        """The objective, what `make_objective` returns."""
        trained, found = self._trained(), vars(self).get("_objective")
        known, was_inside = vars(self).get("_objective_of", (None, False))
        if found is None or known is not trained or (was_inside and not _inside(found.model, trained)):
            try:
                found = self.make_objective()
            except AttributeError as error:  # a module would report that it has no `objective`
                raise RuntimeError(f"make_objective of {type(self).__name__} failed: {error}") from error
            if found.per_sample:
                raise TypeError(
                    f"make_objective must return one that keeps nothing of each sample, got {type(found).__name__} "
                    f"with {', '.join(found.per_sample)}: train it by `fastcure finetune` or in a loop of your own"
                )
            refuse_parameters_beside(trained, found)
            # Past `nn.Module.__setattr__`, which would make submodules of them.
            vars(self).update(_objective=found, _objective_of=(trained, _inside(found.model, trained)))
        return found

    def _trained(self) -> nn.Module:
        """Return the module whose parameters are trained, which a trainer may exchange for another."""
        raise NotImplementedError

    def _follow_schedules(self, share: float, epochs: float) -> dict[str, float]:
        """Set the numbers of the objective that have a schedule.

        Args:
            share: of the run that is done, in [0, 1].
            epochs: length of the run.

        Returns:
            The values set.

        Raises:
            ValueError: if `schedules` names something else, or a schedule cannot be read.
        """
        known = self.objective.scheduled
        for name in self.schedules:
            if name not in known:
                kind = type(self.objective).__name__
                raise ValueError(f"schedules of {kind} may name {', '.join(known) or 'nothing'}, got {name!r}")
        values = {name: schedule(text, epochs, name).at(share * epochs) for name, text in self.schedules.items()}
        for name, value in values.items():
            setattr(self.objective, name, value)
        return values


def _inside(network: nn.Module, module: nn.Module) -> bool:
    return any(each is network for each in module.modules())
