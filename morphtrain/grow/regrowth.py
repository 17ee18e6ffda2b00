"""Shared by `selective` and `adaptive`: grow a run's network where pruning left the channels."""

from __future__ import annotations

from typing import Any, cast

from morphtrain import schema
from morphtrain.cost import CostKind
from morphtrain.cost.latency import Terms, known_terms
from morphtrain.grow.kept import Growth, grow_where_kept
from morphtrain.grow.limits import share_of_limits
from morphtrain.grow.size import Cost
from morphtrain.morph import ChannelGraph
from morphtrain.state import Run

GONE = ""  # in place of the names of spaces that have gone: no space is called that


class Regrowth:
    """`kept.grow_where_kept` with what it needs from a run: the widths to compare with, and the cost."""

    def __init__(self, config: schema.grow.Selective | schema.grow.Adaptive) -> None:
        self.config, self.kind = config, cast(CostKind, config.cost)
        self.reference: dict[str, int] = {}  # widths by space name: at the start, then after each growth
        self.latency: Terms = {}  # measured so far, if that is the cost

    def start(self, run: Run) -> None:
        """Note the widths to compare with; call it before the first epoch of a run that is not resumed."""
        run.width_cost(self.kind, self.latency)  # measures before the first epoch
        self.reference = {space.name: space.size for space in run.graph.spaces}

    def follow(self, run: Run) -> None:
        """Call spaces what they are called after the change that has just been made."""
        reference: dict[str, int] = {}
        for name, width in self.reference.items():
            now = run.renamed.get(name, GONE)
            reference[now] = reference.get(now, 0) + width  # several spaces may have become one
        self.reference = reference

    def cost(self, run: Run) -> float:
        """What the network costs now."""
        return run.width_cost(self.kind, self.latency)()

    def share_of_limits(self, run: Run, graph: ChannelGraph) -> Cost:
        """The cost as a share of the hard limits."""
        return share_of_limits(run, graph, self.config.max_params, self.config.max_macs)

    def grow(self, run: Run, target: float) -> Growth:
        """Grow what kept its channels to `target`, within the limits; the new widths become the reference."""

        def share(graph: ChannelGraph) -> Cost:
            cost, limits = run.width_cost(self.kind, self.latency, graph), self.share_of_limits(run, graph)
            return lambda widths: max(cost(widths) / target, limits(widths))

        with run.precision.autocast():
            growth = grow_where_kept(
                run.graph,
                self.reference,
                share,
                target=1.0,
                keep_fraction=self.config.keep_fraction,
                operator=self.config.operator,  # type: ignore[arg-type]
                start=self.config.start,  # type: ignore[arg-type]
                calibration=run.training_inputs(self.config.calibration_batches),
                noise=self.config.noise,
                generator=run.generator(run.epoch),
                optimizer=run.optimizer,
            )
        self.reference = {space.name: space.size for space in run.graph.spaces}
        return growth

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, "latency": self.latency}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference, self.latency = state["reference"], known_terms(state, "grow.cost")
