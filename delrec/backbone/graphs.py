"""The conventional models as ONNX graphs: the nodes that compute what models.py computes.

They are written by hand, for two reasons. torch's exporter needs three more packages and half a
minute, and the graph it makes of a SASRec has four times the nodes. And products of weights can be
formed once, at export: a request costs half of what it did. Whoever writes a file checks it against
the model itself (delrec/serving/onnx_file.py).

Names: B requests, L window, E width, I items (ids 1..I, 0 pads on the left), X filters.
"""

from collections.abc import Callable

import numpy as np
import torch

# added to the score of a place that is not seen: e to its power is 0, and 0 times it is a number
UNSEEN = np.float32(-1e30)


class Graph:
    """Nodes of an ONNX graph, one behind the other, and the arrays they read."""

    def __init__(self) -> None:
        self.nodes: list = []
        self.weights: dict[str, np.ndarray] = {}

    def keep(self, array: np.ndarray | torch.Tensor | list | float, name: str = "") -> str:
        """The name of an array that nodes read; numbers with a fraction are float32."""
        array = array.detach().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        name = name or f"w{len(self.weights)}"
        self.weights[name] = np.ascontiguousarray(array)
        return name

    def add(self, op: str, *inputs, name: str = "", **attributes) -> str:
        """The name of a new node's first output. inputs: names of outputs, or arrays."""
        from onnx import helper

        names = [x if isinstance(x, str) else self.keep(x) for x in inputs]
        name = name or f"x{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [name], **attributes))
        return name

    def add_many(self, op: str, outputs: list[str], *inputs, **attributes) -> list[str]:
        """The names of all outputs of a new node; a blank one is not asked for."""
        self.add(op, *inputs, **attributes)
        self.nodes[-1].output[:] = outputs
        return outputs


def product(*weights: torch.Tensor) -> torch.Tensor:
    """The product of some matrices, formed in 64 bits: nothing is rounded before its end."""
    whole = weights[0].double()
    for weight in weights[1:]:
        whole = whole @ weight.double()
    return whole.detach().float()


def linear(graph: Graph, x: str, layer: torch.nn.Linear) -> str:
    """A linear layer of the last axis."""
    x = graph.add("MatMul", x, layer.weight.T)
    return x if layer.bias is None else graph.add("Add", x, layer.bias)


def normed(graph: Graph, x: str, layer: torch.nn.LayerNorm) -> str:
    """A norm of the last axis."""
    return graph.add("LayerNormalization", x, layer.weight, layer.bias, epsilon=layer.eps)


# ---------------------------------------------------------------- SASRec


def sasrec(graph: Graph, model: torch.nn.Module, seq_BL: str) -> str:
    """x_BE, the state after the last item."""
    L, E = model.position.weight.shape
    x_BLE = graph.add("Gather", "item_IE", seq_BL)
    x_BLE = graph.add("Mul", x_BLE, np.float32(E**0.5))
    x_BLE = graph.add("Add", x_BLE, model.position.weight.flip(0))
    # a place sees itself, always, and the real items before it
    pad_BL = graph.add("Cast", graph.add("Equal", seq_BL, np.int64(0)), to=1)
    pad_B1L = graph.add("Unsqueeze", pad_BL, np.array([1]))
    other_LL = UNSEEN * (1 - np.eye(L, dtype=np.float32))
    later_LL = UNSEEN * np.triu(np.ones((L, L), np.float32), 1)
    unseen_BLL = graph.add("Add", graph.add("Mul", pad_B1L, other_LL), later_LL)
    unseen_B1L = graph.add("Mul", pad_B1L, other_LL[-1:])
    x_BLE = block(graph, model.blocks[0], x_BLE, unseen_BLL, last=False)
    x_B1E = block(graph, model.blocks[1], x_BLE, unseen_B1L, last=True)
    return graph.add("Squeeze", normed(graph, x_B1E, model.norm), np.array([1]))


def block(graph: Graph, part: torch.nn.Module, x_BLE: str, unseen: str, last: bool) -> str:
    """Attention and a position-wise layer; with `last` of the last position only, x_B1E.

    With one head a query meets a key as y Q K' y', and a value leaves as y V O: each pair of
    matrices is one. What a query adds to all keys alike is nothing after the softmax.
    """
    E = part.q.in_features
    key, value = part.kv.weight[:E], part.kv.weight[E:]
    y_BLE = normed(graph, x_BLE, part.norm1)
    if last:
        end = graph.keep(np.array([-1]))
        x_BRE = graph.add("Gather", x_BLE, end, axis=1)
        y_BRE = graph.add("Gather", y_BLE, end, axis=1)
    else:
        x_BRE, y_BRE = x_BLE, y_BLE
    scale = E**-0.5
    u_BRE = graph.add("MatMul", y_BRE, scale * product(part.q.weight.T, key))
    u_BRE = graph.add("Add", u_BRE, scale * product(part.q.bias[None], key)[0])
    y_BEL = graph.add("Transpose", y_BLE, perm=[0, 2, 1])
    a_BRL = graph.add("Softmax", graph.add("Add", graph.add("MatMul", u_BRE, y_BEL), unseen))
    z_BRE = graph.add("MatMul", a_BRL, y_BLE)  # then the values: R rows, not L
    z_BRE = graph.add("MatMul", z_BRE, product(value.T, part.out.weight.T))
    bias_E = product(part.kv.bias[None, E:], part.out.weight.T)[0] + part.out.bias
    x_BRE = graph.add("Add", x_BRE, graph.add("Add", z_BRE, bias_E))
    inner = graph.add("Relu", linear(graph, normed(graph, x_BRE, part.norm2), part.inner))
    return graph.add("Add", x_BRE, linear(graph, inner, part.outer))


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
}
