"""Follow every channel of a network from where it is made to where it is used.

`torch.fx` gives the graph (`recording.py`). Running it on tensors without storage (the meta device) gives the shapes.
Each activation carries labels (`labels.py`), which the rules (`rules/`) move and join. The result is a list of axes,
the dimensions of parameters, each with its labels; `division.py` reads the channel spaces off them.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from morphtrain.errors import first_line
from morphtrain.morph.modes import kept_attributes, kept_buffers, kept_modes
from morphtrain.morph.paths import matches
from morphtrain.morph.trace.computed import computed_weights
from morphtrain.morph.trace.labelled import LabelledGraph
from morphtrain.morph.trace.labels import fixed
from morphtrain.morph.trace.nodes import call_name, fixed_like, holds_tensors
from morphtrain.morph.trace.norms import norms_with_activations
from morphtrain.morph.trace.recording import UNTRACEABLE, record_modes
from morphtrain.morph.trace.rules import functions, layers
from morphtrain.morph.trace.traced import SAMPLES, Trace
from morphtrain.morph.trace.values import Evaluator, samples_like


def trace_channels(model: nn.Module, example_input: Any, ignore: Sequence[str] = ()) -> Trace:
    """Trace `model` on `example_input`; the model, its mode, its buffers and the random state are left as they are.

    Args:
        example_input: a tensor with a batch dimension, or a sequence of such for a model of several inputs.
        ignore: `fnmatch` patterns of module paths that are not looked into. These modules keep all their shapes, and
            so do their inputs and outputs.

    Raises:
        MorphError: naming the operation, the module path and the source line of what cannot be followed.
    """
    with kept_modes(model), kept_buffers(model), kept_attributes(model), torch.no_grad():
        activations = norms_with_activations(model)
        inputs = example_input if isinstance(example_input, (tuple, list)) else (example_input,)
        computed = computed_weights(model)
        ignore = (*ignore, *map(glob.escape, computed.kept))
        recordings = record_modes(model, ignore, activations, inputs)
        labelled = LabelledGraph(model, recordings, ignore, activations, computed)
        model.eval()  # a norm in training mode refuses one value per channel
        for recording in recordings:  # the axes of the second are those of the first: their labels are joined
            Propagator(labelled, recording.graph).run(*map(samples_like, inputs))
        return labelled.result()


class Propagator(Evaluator):
    """Runs the graph on tensors without storage, and labels the result of every call."""

    def __init__(self, labelled: LabelledGraph, graph: fx.Graph) -> None:
        super().__init__(labelled.model, graph)
        self.labelled = labelled

    def run_node(self, n: fx.Node) -> Any:
        """The value of a call; its labels are put beside it."""
        value = self._value(n)
        if isinstance(value, torch.Tensor):
            n.meta["shape"] = value.shape
        self.labelled.values[n], self.labelled.joins.caller = value, n
        self._label(n, value)
        return value

    def _value(self, n: fx.Node) -> Any:
        try:
            return self.evaluated(n)
        except UNTRACEABLE as error:
            what = f"which fails on the example input, as a batch of {SAMPLES}"
            self.labelled.refuse(n, f"{call_name(n)}, {what}: {first_line(error)}")

    def _label(self, n: fx.Node, value: Any) -> None:
        g = self.labelled
        if n.op == "placeholder":
            g.labels[n] = fixed(value.dim()) if isinstance(value, torch.Tensor) else ()
        elif n.op == "output":
            g.pin_inputs(n)
        elif n.op == "get_attr":
            if isinstance(value, torch.Tensor):
                g.labels[n] = g.parameter_labels(n, value)
        elif holds_tensors(value):
            g.labels[n] = self._followed(n, value)
        else:
            functions.number(g, n, value)

    def _followed(self, n: fx.Node, value: Any) -> Any:
        """The labels of a call that gives tensors."""
        g = self.labelled
        if n.op == "call_module" and matches(str(n.target), g.ignore):
            g.pin_inputs(n)
            return fixed_like(value)
        if all(map(g.is_fixed, n.all_input_nodes)) and not g.has_weights(n):
            return fixed_like(value)
        if n.op == "call_module":
            return layers.follow(g, n, self.submodules[str(n.target)], value)
        return functions.follow(g, n, value)
