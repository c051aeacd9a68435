"""The nodes that the graphs of several conventional models are made of.

Names: B requests, L window, R places of it, E width, F inner width, N rows.
"""

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


# ---------------------------------------------------------------- attention


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


def attention(graph: Graph, u_BRE: str, y_BLE: str, unseen: str) -> str:
    """z_BRE, the mean that R places take of what they see."""
    y_BEL = graph.add("Transpose", y_BLE, perm=[0, 2, 1])
    a_BRL = graph.add("Add", graph.add("MatMul", u_BRE, y_BEL), unseen)
    return graph.add("MatMul", graph.add("Softmax", a_BRL), y_BLE)


# ---------------------------------------------------------------- layers.py


def mixed(graph: Graph, layer: torch.nn.Module, y_BRE: str, y_BLE: str, unseen: str) -> str:
    """z_BRE, the attention of R places to all L. A query meets a key as y Q K' y', so the
    two matrices are one, formed at export; V and W_o too."""
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


def position_wise(graph: Graph, layer: torch.nn.Module, y_BRE: str) -> str:
    """LN(W_2 gelu(W_1 y) + y); gelu(v) = v (1 + erf(v / sqrt 2)) / 2."""
    v_BRF = product_with(graph, y_BRE, layer.inner)
    erf_BRF = graph.add("Erf", graph.add("Mul", v_BRF, np.float32(0.5**0.5)))
    v_BRF = graph.add("Mul", v_BRF, graph.add("Add", erf_BRF, np.float32(1)))
    outer_BRE = product_with(graph, graph.add("Mul", v_BRF, np.float32(0.5)), layer.outer)
    return normed(graph, graph.add("Add", outer_BRE, y_BRE), layer.norm)


def last_place(graph: Graph, x_BLE: str) -> str:
    """x_B1E, the last place's row."""
    return graph.add("Gather", x_BLE, np.array([-1]), axis=1)


def product_with(graph: Graph, x_BRE: str, layer: torch.nn.Linear) -> str:
    """A linear layer of rows that stand in windows."""
    x_BRF = graph.add("MatMul", x_BRE, layer.weight.T)
    return x_BRF if layer.bias is None else graph.add("Add", x_BRF, layer.bias)
