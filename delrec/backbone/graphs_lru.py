"""LRURec as an ONNX graph; see graphs.py. Complex numbers are two real ones.

Names: B requests, L window, R places of it, E width, S complex numbers of a state, I items.
"""

import numpy as np
import torch

from delrec.backbone.onnx_nodes import Graph, last_place, normed, position_wise


def lrurec(graph: Graph, model: torch.nn.Module, seq_BL: str) -> str:
    """x_BE, the state after the last item."""
    L = model.history
    y_BLE = normed(graph, graph.add("Gather", "item_IE", seq_BL), model.norm)
    real_BL = graph.add("Cast", graph.add("Cast", seq_BL, to=9), to=1)
    real_BL1 = graph.add("Unsqueeze", real_BL, np.array([2]))
    first, second = model.blocks
    h_BLS = recurrence(graph, first.lru, inputs(graph, first.lru, y_BLE, real_BL1), L)
    y_BLE = behind_state(graph, first, y_BLE, h_BLS)
    h_B1S = last_state(graph, second.lru, inputs(graph, second.lru, y_BLE, real_BL1), L)
    y_B1E = behind_state(graph, second, last_place(graph, y_BLE), h_B1S)
    return graph.add("Squeeze", y_B1E, np.array([1]))


def inputs(graph: Graph, lru: torch.nn.Module, y_BLE: str, real_BL1: str) -> tuple[str, str]:
    """What a recurrence takes in, u_BLS: its real and its imaginary part."""
    gamma_S = lru.log_gamma.exp()
    parts = []
    for weight, bias in zip(lru.inward.weight.chunk(2), lru.inward.bias.chunk(2)):
        u_BLS = graph.add("MatMul", y_BLE, gamma_S * weight.T)
        u_BLS = graph.add("Add", u_BLS, gamma_S * bias)
        parts.append(graph.add("Mul", u_BLS, real_BL1))
    return parts[0], parts[1]


def powers(lru: torch.nn.Module, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The real and the imaginary part of lambda^n, (.., S) for each number in n (.., 1)."""
    exponent = torch.complex(-lru.nu.double().exp(), lru.theta.double().exp())
    lam = torch.exp(n * exponent)
    return lam.real.float(), lam.imag.float()


def turned(graph: Graph, lam: tuple, h: tuple[str, str]) -> tuple[str, str]:
    """lambda * h: products of complex numbers, in parts."""
    ac, bd, ad, bc = (graph.add("Mul", h[j], lam[i]) for i, j in ((0, 0), (1, 1), (0, 1), (1, 0)))
    return graph.add("Sub", ac, bd), graph.add("Add", ad, bc)


def recurrence(
    graph: Graph, lru: torch.nn.Module, u_BLS: tuple[str, str], L: int
) -> tuple[str, str]:
    """The states h_BLS of all places, by doubling as delrec/backbone/lru.py does it."""
    h_BLS, n = u_BLS, 1
    while n < L:
        begin, end, columns = np.array([0]), np.array([L - n]), np.array([1])
        earlier = [graph.add("Slice", x, begin, end, columns) for x in h_BLS]
        earlier = [graph.add("Pad", x, np.array([0, n, 0, 0, 0, 0])) for x in earlier]
        faded = turned(graph, powers(lru, torch.tensor([n])), (earlier[0], earlier[1]))
        h_BLS = graph.add("Add", h_BLS[0], faded[0]), graph.add("Add", h_BLS[1], faded[1])
        n *= 2
    return h_BLS


def last_state(
    graph: Graph, lru: torch.nn.Module, u_BLS: tuple[str, str], L: int
) -> tuple[str, str]:
    """h_B1S of the last place alone, the sum over s of lambda^(L - s) u_s."""
    parts = turned(graph, powers(lru, torch.arange(L - 1, -1, -1)[:, None]), u_BLS)
    real, imaginary = (graph.add("ReduceSum", x, np.array([1]), keepdims=1) for x in parts)
    return real, imaginary


def behind_state(graph: Graph, block: torch.nn.Module, y_BRE: str, h_BRS: tuple[str, str]) -> str:
    """The block's rows from its input and its states: Re(W_out h), then the position-wise layer."""
    parts = zip(h_BRS, block.lru.outward.weight.chunk(2, 1))
    real, imaginary = (graph.add("MatMul", x, weight.T) for x, weight in parts)
    x_BRE = graph.add("Sum", real, imaginary, block.lru.outward.bias, y_BRE)
    return position_wise(graph, block.ffn, normed(graph, x_BRE, block.norm))
