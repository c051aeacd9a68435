"""The conventional models as ONNX graphs: the nodes that compute what models.py computes.

They are written by hand, for two reasons. torch's exporter needs two more packages and half a
minute, and torch's older one makes 132 nodes of a GRU4Rec, here it has 25. And products of two
matrices of weights can be formed once, at export. Whoever writes a file checks it against the model
itself (delrec/serving/onnx_file.py).

Names: B requests, L window, R places of it, E width, I items (ids 1..I, 0 pads on the left), X
filters, F inner width.
"""

from collections.abc import Callable

import numpy as np
import torch

from delrec.backbone.bsarec import ALPHA

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
        self.weights[name] = array.copy(order="C")
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


def linear(graph: Graph, x_NE: str, layer: torch.nn.Linear) -> str:
    """A linear layer of rows."""
    return affine(graph, x_NE, layer.weight.T, layer.bias)


def affine(graph: Graph, x_NE: str, weight: torch.Tensor, bias: torch.Tensor) -> str:
    """The rows x W + b, by one node."""
    return graph.add("Gemm", x_NE, weight, bias)


def normed(graph: Graph, x_NE: str, layer: torch.nn.LayerNorm) -> str:
    """A norm of rows."""
    return graph.add("LayerNormalization", x_NE, layer.weight, layer.bias, epsilon=layer.eps)


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


def unseen_by_last(graph: Graph, seq_BL: str, L: int) -> str:
    """unseen_B1L, what is added to what the last place gives every place: it sees the real items.
    It is never padding itself, but in an empty history, where it sees itself: no number is equal
    to -1.
    """
    padding_L = np.array([0] * (L - 1) + [-1])
    unseen_BL = graph.add("Where", graph.add("Equal", seq_BL, padding_L), UNSEEN, np.float32(0))
    return graph.add("Unsqueeze", unseen_BL, np.array([1]))


def later(L: int) -> np.ndarray:
    """What is added to what a place (row) gives another, (L, L): no place sees a later one."""
    return UNSEEN * np.triu(np.ones((L, L), np.float32), 1)


def queries(graph: Graph, block: torch.nn.Module, y_NE: str) -> str:
    """What meets the keys. There is one head, so a query meets a key as y Q K' y', and the two
    matrices are one. What a query adds to all keys alike is nothing after the softmax."""
    E = block.q.in_features
    query, key, scale = block.q, block.kv.weight[:E], E**-0.5
    bias_E = product(query.bias[None], key)[0]
    return affine(graph, y_NE, scale * product(query.weight.T, key), scale * bias_E)


def attention(graph: Graph, u_BRE: str, y_BLE: str, unseen: str) -> str:
    """z_BRE, the mean that R places take of what they see."""
    y_BEL = graph.add("Transpose", y_BLE, perm=[0, 2, 1])
    a_BRL = graph.add("Add", graph.add("MatMul", u_BRE, y_BEL), unseen)
    return graph.add("MatMul", graph.add("Softmax", a_BRL), y_BLE)


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


# ---------------------------------------------------------------- layers.py


def mixed(graph: Graph, layer: torch.nn.Module, y_BRE: str, y_BLE: str, unseen: str) -> str:
    """z_BRE, the attention of R places to all L; see queries for what is formed at export."""
    E = layer.q.in_features
    key, value = layer.kv.weight.split(E)
    heads = []
    for at in torch.arange(E).chunk(layer.heads):
        scale = len(at) ** -0.5
        u_BRE = graph.add("MatMul", y_BRE, scale * product(layer.q.weight[at].T, key[at]))
        u_BRE = graph.add("Add", u_BRE, scale * product(layer.q.bias[None, at], key[at])[0])
        z_BRE = attention(graph, u_BRE, y_BLE, unseen)
        heads.append(graph.add("MatMul", z_BRE, product(value[at].T, layer.out.weight[:, at].T)))
    bias_E = product(layer.kv.bias[None, E:], layer.out.weight.T)[0] + layer.out.bias
    return graph.add("Sum", *heads, bias_E)


def last_place(graph: Graph, x_BLE: str) -> str:
    """x_B1E, the last place's row."""
    return graph.add("Gather", x_BLE, np.array([-1]), axis=1)


def product_with(graph: Graph, x_BRE: str, layer: torch.nn.Linear) -> str:
    """A linear layer of rows that stand in windows."""
    x_BRF = graph.add("MatMul", x_BRE, layer.weight.T)
    return x_BRF if layer.bias is None else graph.add("Add", x_BRF, layer.bias)


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


def position_wise(graph: Graph, layer: torch.nn.Module, y_BRE: str) -> str:
    """LN(W_2 gelu(W_1 y) + y); gelu(v) = v (1 + erf(v / sqrt 2)) / 2."""
    v_BRF = product_with(graph, y_BRE, layer.inner)
    erf_BRF = graph.add("Erf", graph.add("Mul", v_BRF, np.float32(0.5**0.5)))
    v_BRF = graph.add("Mul", v_BRF, graph.add("Add", erf_BRF, np.float32(1)))
    outer_BRE = product_with(graph, graph.add("Mul", v_BRF, np.float32(0.5)), layer.outer)
    return normed(graph, graph.add("Add", outer_BRE, y_BRE), layer.norm)


# by the name that train_backbone.py --model gives
GRAPHS: dict[str, Callable[[Graph, torch.nn.Module, str], str]] = {
    "sasrec": sasrec,
    "gru4rec": gru4rec,
    "caser": caser,
    "esasrec": esasrec,
    "bsarec": bsarec,
}
