"""Replace operations on complex numbers that an exported program can run in Python only.

Inductor lowers a change of complex precision, and a reversal of complex values, to operations of
torch's ``prims`` namespace. Python has them; a C++ program stops with "Could not find schema for
prims::...". Sums and differences of complex numbers that are not compiled stop with "Mismatch
between ints consumed and num_ints", because the factor of the second one is not passed as a
number; a product with a Python number cannot be compiled everywhere; and complex zeros become a
scalar whose shape is not passed. The same operations on real pairs are compiled, and faster.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

__all__ = ["replace"]

_aten = torch.ops.aten
CASTS = (_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten._to_copy.default)
REVERSALS = (_aten.flip.default,)
TOTALS = (_aten.sum.dim_IntList,)
ZEROS = (_aten.new_zeros.default, _aten.zeros_like.default, _aten.zeros.default)
SUMS = (_aten.add.Tensor, _aten.sub.Tensor)
PRODUCTS = (_aten.mul.Tensor, _aten.div.Tensor)


def replace(graph: fx.Graph) -> int:
    """Replace the operations in a graph of an exported program; returns their number."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_complex(node):
            continue
        made, inputs = node.meta["val"], [one for one in node.all_input_nodes if _is_complex(one)]
        with graph.inserting_before(node):
            if node.target in CASTS and inputs and _differs(inputs[0], made):
                result = _cast(graph, inputs[0], made.dtype)
            elif node.target in REVERSALS:
                axes = [axis % made.ndim for axis in node.args[1]]
                pairs = _call(graph, _aten.flip.default, _pairs(graph, inputs[0]), axes)
                result = _call(graph, _aten.view_as_complex.default, pairs)
            elif node.target in TOTALS and node.args[1]:
                axes = [axis % inputs[0].meta["val"].ndim for axis in node.args[1]]
                pairs = _as_pairs(graph, inputs[0], made.dtype)
                pairs = _call(graph, node.target, pairs, axes, *node.args[2:])
                result = _call(graph, _aten.view_as_complex.default, pairs)
            elif node.target in ZEROS:
                pairs = graph.call_function(
                    _aten.zeros.default, ([*made.shape, 2],), {"dtype": made.dtype.to_real()}
                )
                with made.fake_mode:  # type: ignore[attr-defined]
                    pairs.meta["val"] = torch.zeros(*made.shape, 2, dtype=made.dtype.to_real())
                result = _call(graph, _aten.view_as_complex.default, pairs)
            elif node.target in SUMS and all(isinstance(one, fx.Node) for one in node.args[:2]):
                terms = [_as_pairs(graph, one, made.dtype) for one in node.args[:2]]
                pairs = _call(graph, node.target, *terms, **node.kwargs)
                result = _call(graph, _aten.view_as_complex.default, pairs)
            elif node.target in PRODUCTS and _has_real_factor(node):
                pairs = _product(graph, node, made.dtype)
                result = _call(graph, _aten.view_as_complex.default, pairs)
            elif node.target in PRODUCTS and any(_differs(one, made) for one in inputs):
                for one in inputs:
                    if _differs(one, made):
                        node.replace_input_with(one, _cast(graph, one, made.dtype))
                count += 1
                continue
            else:
                continue
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        count += 1
    graph.lint()
    return count


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _differs(node: fx.Node, made: Tensor) -> bool:
    return bool(node.meta["val"].dtype != made.dtype)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    pairs = _call(graph, _aten.to.dtype, _pairs(graph, node), dtype.to_real())
    return _call(graph, _aten.view_as_complex.default, pairs)


def _has_real_factor(node: fx.Node) -> bool:
    """Return whether a product is of one complex tensor, or a quotient by a real number."""
    first, second = node.args[:2]
    tensors = [one for one in (first, second) if isinstance(one, fx.Node) and _is_complex(one)]
    if node.target == _aten.div.Tensor:
        return len(tensors) == 1 and tensors[0] is first and not isinstance(second, complex)
    return len(tensors) <= 1


def _product(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return real pairs of a product, or quotient, of complex and real numbers."""
    parts: list[Any] = []
    numbers = [one for one in node.args if isinstance(one, complex)]
    if numbers:
        (factor,) = numbers
        pairs = _as_pairs(graph, node.all_input_nodes[0], dtype)
        halves = [_call(graph, _aten.select.int, pairs, -1, part) for part in (0, 1)]
        (ax, ay), (bx, by) = (
            [_call(graph, _aten.mul.Tensor, half, number) for half in halves]
            for number in (factor.real, factor.imag)
        )
        first = _call(graph, _aten.sub.Tensor, ax, by)  # (x + i y) (a + i b)
        second = _call(graph, _aten.add.Tensor, ay, bx)
        return _call(graph, _aten.stack.default, [first, second], -1)
    for one in node.args:
        if isinstance(one, fx.Node) and _is_complex(one):
            parts.append(_as_pairs(graph, one, dtype))
        elif isinstance(one, fx.Node):
            parts.append(_call(graph, _aten.unsqueeze.default, one, -1))
        else:
            parts.append(one)
    product = _call(graph, node.target, *parts)
    same = product.meta["val"].dtype == dtype.to_real()
    return product if same else _call(graph, _aten.to.dtype, product, dtype.to_real())


def _as_pairs(graph: fx.Graph, node: Any, dtype: torch.dtype) -> fx.Node:
    """Return real pairs of numbers in the precision of complex numbers of type ``dtype``."""
    real = dtype.to_real()
    if _is_complex(node):
        pairs = _pairs(graph, node)
        return (
            _call(graph, _aten.to.dtype, pairs, real) if node.meta["val"].dtype != dtype else pairs
        )
    value = _call(graph, _aten.to.dtype, node, real)
    zeros = _call(graph, _aten.zeros_like.default, value)
    return _call(graph, _aten.stack.default, [value, zeros], -1)


def _pairs(graph: fx.Graph, node: fx.Node) -> fx.Node:
    resolved = _call(graph, _aten.resolve_conj.default, node)
    return _call(graph, _aten.view_as_real.default, resolved)


def _call(graph: fx.Graph, operation: Any, *arguments: Any, **options: Any) -> fx.Node:
    """Add a call with the shape and precision of its result, which later passes read."""
    node = graph.call_function(operation, arguments, options)
    values = map_arg(arguments, lambda one: one.meta["val"])
    with next(one.meta["val"].fake_mode for one in node.all_input_nodes):
        node.meta["val"] = operation(*values, **options)
    return node
