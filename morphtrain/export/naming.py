"""Names of an ONNX graph by the modules of the network, as Netron and other viewers show them.

torch's exporter numbers what it finds: `node_conv2d_3`. Here that is `stages.0.1.branch.0`, the path of its module in
the network as it is now, pruned or grown.
"""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from typing import Any

SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the paths of the modules around it from "" on, and its own name


def name_by_modules(graph: Any) -> None:
    """Name the nodes of a graph of onnx_ir, and what they compute, by the modules that they come from.

    The one operation of a layer has the layer's path. Where a module has several, and where it only holds others, the
    operation follows: `stages.0.1/Add`. Inputs, outputs and weights keep their names.
    """
    paths = [_path(node) for node in graph]
    counts = Counter(paths)
    holders = {parent for path in counts for parent in _parents(path)}
    outputs = {id(value) for value in graph.outputs}
    taken = {"", *graph.initializers, *(value.name for value in (*graph.inputs, *graph.outputs))}
    for node, path in zip(graph, paths, strict=True):
        is_layer = counts[path] == 1 and path not in holders
        node.name = _free(path if is_layer else f"{path}/{node.op_type}".lstrip("/"), taken)
        for number, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = node.name if number == 0 else _free(f"{node.name}:{number}", taken)
        node.metadata_props.clear()  # paths of the machine, and torch's own graph
    graph.metadata_props.clear()


def _path(node: Any) -> str:
    """That of the module whose weight a node uses, or else of the innermost one around it; "" for the network itself.

    A convolution into which the exporter has folded the batch norm after it is still called by its own name.
    """
    for value in node.inputs:
        if value is not None and value.is_initializer() and "." in value.name:
            return str(value.name.rpartition(".")[0])
    *modules, _ = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
    return str(modules[-1]) if modules and modules[0] == "" else ""


def _parents(path: str) -> list[str]:
    """The paths of the modules around the one at `path`."""
    parts = path.split(".")
    return ["", *(".".join(parts[:end]) for end in range(1, len(parts)))] if path else []


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken; it is taken then."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    found = next(one for one in itertools.chain([name], numbered) if one not in taken)
    taken.add(found)
    return found
