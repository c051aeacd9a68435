"""eSASRec, BSARec and BERT4Rec as ONNX graphs; see graphs.py.

Names: B requests, L window, R places of it, E width, F inner width, I items.
"""

import numpy as np
import torch

from delrec.backbone.bsarec import ALPHA
from delrec.backbone.onnx_nodes import (
    Graph,
    last_place,
    later,
    mixed,
    normed,
    position_wise,
    product_with,
    unseen_by_last,
)

# ---------------------------------------------------------------- eSASRec


def esasrec(graph: Graph, model: torch.nn.Module, seq_BL: str) -> str:
    """x_BE, the state after the last item."""
    L = model.history
    x_BLE = graph.add("Gather", "item_IE", seq_BL)
    x_BLE = graph.add("Add", x_BLE, model.position.weight.flip(0))
    unseen_B1L = unseen_by_last(graph, seq_BL, L)
    unseen_BLL = graph.add("Add", unseen_B1L, later(L))
    first, second = model.blocks
    y_BLE = normed(graph, x_BLE, first.norm1)
    x_BLE = ligr(graph, first, x_BLE, mixed(graph, first.attention, y_BLE, y_BLE, unseen_BLL))
    y_BLE = normed(graph, x_BLE, second.norm1)
    y_B1E, x_B1E = (last_place(graph, x) for x in (y_BLE, x_BLE))
    z_B1E = mixed(graph, second.attention, y_B1E, y_BLE, unseen_B1L)
    return graph.add("Squeeze", ligr(graph, second, x_B1E, z_B1E), np.array([1]))


def ligr(graph: Graph, block: torch.nn.Module, x_BRE: str, z_BRE: str) -> str:
    """The block's rows from its input and its attention: both of its halves are gated."""
    x_BRE = graph.add("Add", x_BRE, gated(graph, block.gate1, x_BRE, z_BRE))
    v_BRE, ff = normed(graph, x_BRE, block.norm2), block.ff
    one_BRF, three_BRF = (product_with(graph, v_BRE, layer) for layer in (ff.w1, ff.w3))
    silu_BRF = graph.add("Mul", one_BRF, graph.add("Sigmoid", one_BRF))
    ff_BRE = product_with(graph, graph.add("Mul", silu_BRF, three_BRF), ff.w2)
    return graph.add("Add", x_BRE, gated(graph, block.gate2, x_BRE, ff_BRE))


def gated(graph: Graph, gate: torch.nn.Linear, x_BRE: str, half_BRE: str) -> str:
    """sigmoid(G x) times what a half of the block says."""
    return graph.add("Mul", graph.add("Sigmoid", product_with(graph, x_BRE, gate)), half_BRE)


# ---------------------------------------------------------------- BSARec


def bsarec(graph: Graph, model: torch.nn.Module, seq_BL: str) -> str:
    """x_BE, the state after the last item."""
    L, low_LL = model.history, model.low_LL
    y_BLE = graph.add("Add", graph.add("Gather", "item_IE", seq_BL), model.position.weight)
    y_BLE = normed(graph, y_BLE, model.norm)
    unseen_B1L = unseen_by_last(graph, seq_BL, L)
    # padding is heard by the filter, so what padding sees counts: itself
    unseen_BLL = graph.add("Mul", unseen_B1L, 1 - np.eye(L, dtype=np.float32))
    unseen_BLL = graph.add("Add", unseen_BLL, later(L))
    first, second = model.blocks
    y_BLE = filtered(graph, first, y_BLE, y_BLE, (low_LL, unseen_BLL))
    y_B1E = last_place(graph, y_BLE)
    y_B1E = filtered(graph, second, y_B1E, y_BLE, (low_LL[-1:], unseen_B1L))
    return graph.add("Squeeze", y_B1E, np.array([1]))


def filtered(
    graph: Graph, block: torch.nn.Module, y_BRE: str, y_BLE: str, way: tuple[torch.Tensor, str]
) -> str:
    """The block's rows of R places. way: the filter's rows low_RL, and what they do not see."""
    low_RL, unseen = way
    low_BRE = graph.add("MatMul", low_RL, y_BLE)
    high_BRE = graph.add("Mul", graph.add("Sub", y_BRE, low_BRE), block.beta**2)
    d_BRE = normed(graph, graph.add("Sum", low_BRE, high_BRE, y_BRE), block.norm_d)
    a_BRE = mixed(graph, block.attention, y_BRE, y_BLE, unseen)
    a_BRE = normed(graph, graph.add("Add", a_BRE, y_BRE), block.norm_a)
    d_BRE = graph.add("Mul", d_BRE, np.float32(ALPHA))
    a_BRE = graph.add("Mul", a_BRE, np.float32(1 - ALPHA))
    return position_wise(graph, block.ffn, graph.add("Add", d_BRE, a_BRE))


# ---------------------------------------------------------------- BERT4Rec


def bert4rec(graph: Graph, model: torch.nn.Module, seq_BL: str) -> str:
    """x_BE, the state of the hidden item behind the last one."""
    L = model.history
    rest_BL = graph.add("Slice", seq_BL, np.array([1]), np.array([L]), np.array([1]))
    # the hidden item is written as padding, whose vector is 0, and the mask's is added there
    seq_BL = graph.add("Pad", rest_BL, np.array([0, 0, 0, 1]), np.int64(0))
    added_LE = model.position.weight.detach().flip(0)
    added_LE[-1] += model.mask.detach()
    y_BLE = graph.add("Add", graph.add("Gather", "item_IE", seq_BL), added_LE)
    y_BLE = normed(graph, y_BLE, model.norm)
    # all places see the same: nobody reads what padding makes of it
    unseen_B1L = unseen_by_last(graph, seq_BL, L)
    first, second = model.blocks
    y_BLE = both_ways(graph, first, y_BLE, y_BLE, unseen_B1L)
    y_B1E = both_ways(graph, second, last_place(graph, y_BLE), y_BLE, unseen_B1L)
    return graph.add("Squeeze", y_B1E, np.array([1]))


def both_ways(graph: Graph, block: torch.nn.Module, y_BRE: str, y_BLE: str, unseen_B1L: str) -> str:
    """The block's rows of R places, from what they see of all L."""
    a_BRE = mixed(graph, block.attention, y_BRE, y_BLE, unseen_B1L)
    a_BRE = normed(graph, graph.add("Add", a_BRE, y_BRE), block.norm)
    return position_wise(graph, block.ffn, a_BRE)
