"""The cost's Lagrange multiplier: state that goes with a run from batch to batch, and into its checkpoints. Called by `training`."""

from __future__ import annotations

from asyncrl.learner.objective_config import CostLimit
from asyncrl.learner.penalties import next_multiplier


class Constraint:
    def __init__(self, limit: CostLimit) -> None:
        self._limit = limit
        self.multiplier = limit.multiplier

    def update(self, mean_cost: float) -> None:
        """Once for each batch, after it was trained: it acts from the next one on. Raises ValueError for a cost that is not finite."""
        limit = self._limit
        self.multiplier = next_multiplier(
            self.multiplier, mean_cost, limit.limit, limit.multiplier_rate, limit.max_multiplier
        )

    def state_dict(self) -> dict[str, float]:
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Raises ValueError if there is no multiplier in it, or none above 0."""
        multiplier = state.get("multiplier")
        if multiplier is None or not multiplier > 0:
            raise ValueError(
                f"the checkpoint's cost multiplier must be a number above 0, got {multiplier}: it was written without "
                "learner.objective.cost; resume with the recipe that it was written with"
            )
        self.multiplier = float(multiplier)
