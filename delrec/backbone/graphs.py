"""The conventional models as ONNX graphs: the nodes that compute what models.py computes.

They are written by hand, for two reasons. torch's exporter needs two more packages and half a
minute, and torch's older one makes 132 nodes of a GRU4Rec, here it has 25. And products of two
matrices of weights can be formed once, at export. Whoever writes a file checks it against the model
itself (delrec/serving/onnx_file.py).

Names: B requests, L window, R places of it, E width, I items (ids 1..I, 0 pads on the left), X
filters.
"""

from collections.abc import Callable

import numpy as np
import torch

from delrec.backbone.graphs_attention import bert4rec, bsarec, esasrec
from delrec.backbone.graphs_lru import lrurec
from delrec.backbone.onnx_nodes import (
    Graph,
    affine,
    attention,
    later,
    linear,
    normed,
    product,
    unseen_by_last,
)

# ---------------------------------------------------------------- SASRec


def sasrec(graph: Graph, model: torch.nn.Module, seq_BL: str) -> str:
    """x_BE, the state after the last item. N: all places of all requests, B times L."""
    L, E = model.position.weight.shape
    x_BLE = graph.add("Mul", graph.add("Gather", "item_IE", seq_BL), np.float32(E**0.5))
    x_BLE = graph.add("Add", x_BLE, model.position.weight.flip(0))
    unseen_B1L = unseen_by_last(graph, seq_BL, L)
    unseen_BLL = graph.add("Add", unseen_B1L, later(L))

    first, second = model.blocks
    x_NE = graph.add("Reshape", x_BLE, np.array([-1, E]))
    y_NE = normed(graph, x_NE, first.norm1)
    y_BLE = graph.add("Reshape", y_NE, np.array([-1, L, E]))
    u_BLE = graph.add("Reshape", queries(graph, first, y_NE), np.array([-1, L, E]))
    z_BLE = attention(graph, u_BLE, y_BLE, unseen_BLL)
    z_NE = graph.add("Reshape", z_BLE, np.array([-1, E]))
    x_NE = rest_of_block(graph, first, x_NE, z_NE)

    # of the second block only the last place
    y_NE = normed(graph, x_NE, second.norm1)
    x_BLE = graph.add("Reshape", x_NE, np.array([-1, L, E]))
    y_BLE = graph.add("Reshape", y_NE, np.array([-1, L, E]))
    x_BE, y_BE = (graph.add("Gather", x, np.int64(-1), axis=1) for x in (x_BLE, y_BLE))
    u_B1E = graph.add("Unsqueeze", queries(graph, second, y_BE), np.array([1]))
    z_B1E = attention(graph, u_B1E, y_BLE, unseen_B1L)
    x_BE = rest_of_block(graph, second, x_BE, graph.add("Squeeze", z_B1E, np.array([1])))
    return normed(graph, x_BE, model.norm)


def queries(graph: Graph, block: torch.nn.Module, y_NE: str) -> str:
    """What meets the keys. There is one head, so a query meets a key as y Q K' y', and the two
    matrices are one. What a query adds to all keys alike is nothing after the softmax."""
    E = block.q.in_features
    query, key, scale = block.q, block.kv.weight[:E], E**-0.5
    bias_E = product(query.bias[None], key)[0]
    return affine(graph, y_NE, scale * product(query.weight.T, key), scale * bias_E)


def rest_of_block(graph: Graph, block: torch.nn.Module, x_NE: str, z_NE: str) -> str:
    """The block's rows: the attention's values V O as one matrix, then the position-wise layer."""
    E = block.q.in_features
    value, bias_E = block.kv.weight[E:].T, block.kv.bias[None, E:]
    output = block.out.weight.T
    bias_E = product(bias_E, output)[0] + block.out.bias
    x_NE = graph.add("Add", x_NE, affine(graph, z_NE, product(value, output), bias_E))
    inner_NE = graph.add("Relu", linear(graph, normed(graph, x_NE, block.norm2), block.inner))
    return graph.add("Add", x_NE, linear(graph, inner_NE, block.outer))


# ---------------------------------------------------------------- GRU4Rec


def gru4rec(graph: Graph, model: torch.nn.Module, seq_BL: str) -> str:
    """x_BE, the state after the last item."""
    L, E = model.history, model.item.embedding_dim
    real_BL = graph.add("Cast", graph.add("Cast", seq_BL, to=9), to=7)
    length_B1 = graph.add("ReduceSum", real_BL, np.array([1]))
    # rows are moved to begin at column 0, and read up to their length
    at_BL = graph.add("Add", graph.add("Sub", np.int64(L), length_B1), np.arange(L))
    begun_BL = graph.add("GatherElements", seq_BL, graph.add("Mod", at_BL, np.int64(L)), axis=1)
    x_LBE = graph.add("Gather", "item_IE", graph.add("Transpose", begun_BL, perm=[1, 0]))
    # an empty history is read as one padding item, as the model does
    length_B1 = graph.add("Max", length_B1, np.int64(1))
    length_B = graph.add("Cast", graph.add("Squeeze", length_B1, np.array([1])), to=6)

    def in_order(weight):  # torch: reset, update, new; ONNX: update, reset, new
        reset, update, new = weight.split(E)
        return torch.cat([update, reset, new])

    gru = model.gru
    bias = torch.cat([in_order(gru.bias_ih_l0), in_order(gru.bias_hh_l0)])
    weights = [in_order(gru.weight_ih_l0)[None], in_order(gru.weight_hh_l0)[None], bias[None]]
    sizes = {"hidden_size": E, "linear_before_reset": 1}
    _, x_1BE = graph.add_many("GRU", ["", "last_1BE"], x_LBE, *weights, length_B, **sizes)
    return linear(graph, graph.add("Squeeze", x_1BE, np.array([0])), model.out)


# ---------------------------------------------------------------- Caser


def caser(graph: Graph, model: torch.nn.Module, seq_BL: str) -> str:
    """x_BE, the state after the last item."""
    x_BLE = graph.add("Gather", "item_IE", seq_BL)
    x_BEL = graph.add("Transpose", x_BLE, perm=[0, 2, 1])
    found = []
    for conv in model.across:
        x_BXP = graph.add("Relu", graph.add("Conv", x_BEL, conv.weight, conv.bias))
        found.append(graph.add("ReduceMax", x_BXP, axes=[2], keepdims=0))
    down_BE4 = graph.add("MatMul", x_BEL, model.down.weight.T)
    found.append(graph.add("Flatten", down_BE4))
    return graph.add("Relu", linear(graph, graph.add("Concat", *found, axis=1), model.out))


# by the name that train_backbone.py --model gives
GRAPHS: dict[str, Callable[[Graph, torch.nn.Module, str], str]] = {
    "sasrec": sasrec,
    "gru4rec": gru4rec,
    "caser": caser,
    "esasrec": esasrec,
    "bsarec": bsarec,
    "lrurec": lrurec,
    "bert4rec": bert4rec,
}
