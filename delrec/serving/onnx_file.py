"""A backbone as one ONNX file: histories in, the best items and their scores out.

It answers without torch, without this library and without the run's folder (docs/onnx.md). The file
also holds the titles and the raw ids of its items.

Names: B requests, T items of a history, S items left out, I items, K items of an answer.
"""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from delrec.backbone.graphs import GRAPHS, Graph
from delrec.backbone.models import load, must_be_ours, score
from delrec.backbone.ranking import must_hold_model
from delrec.data.prepared import Data, histories, raw_item_ids, subset
from delrec.names import NAMES
from delrec.processes import Ranks
from delrec.runtime import (
    Run,
    adding_to,
    must_be_writable,
    stop,
    stop_if_replaced,
    writing,
)
from delrec.serving.output import say, say_json

if TYPE_CHECKING:  # both are packages of their own: pip install "delrec[onnx]"
    import onnx
    import onnxruntime

NEEDED = ("onnx", "onnxruntime")
OPSET, FORMAT = 17, 8  # of 2022: every onnxruntime from 1.13 on reads them
MOST_BYTES = 2**31 - 2**24  # a protobuf file holds at most 2 GiB
LARGEST_DIFFERENCE = 1e-5  # of two scores, the file's and the model's; where they are above 1, of 1
CHECKED = 256  # histories


def export_onnx(run: Run, data: Data, out: Path | str | None, ranks: Ranks) -> None:
    """Writes a backbone as an ONNX file: to `out`, else model.onnx in its run folder. It is checked
    against the model first: nothing is written that says something else."""
    stop_unless_backbone(run)
    stop_unless_installed()
    place = Path(out or run.folder)
    place = place / "model.onnx" if place.is_dir() else place
    must_be_writable(place.parent)
    must_hold_model(run)
    if not ranks.main:
        return
    model = load(run.folder)
    content = serialised(file_of(model, run, data))
    found = compared(session_of(content), model, data)
    if not found["difference"] <= LARGEST_DIFFERENCE:
        stop(
            f"the file's scores differ from the model's by {found['difference']:.1e}, more than "
            f"{LARGEST_DIFFERENCE:.0e}, so it was not written; try another version of onnxruntime "
            "(pip install -U onnxruntime), or use evaluate.py --serve"
        )
    stop_if_replaced(run)
    place.parent.mkdir(parents=True, exist_ok=True)
    with adding_to(run.folder), writing(place, "wb") as file:
        file.write(content)
    said = {"out": str(place), "bytes": len(content), "items": data.n_items, **found}
    say(
        f"{place} is written ({len(content) / 1e6:.1f} MB): {NAMES[run.model]}, {data.n_items} "
        f"items with titles and raw ids. On {found['histories']} real histories its scores differ "
        f"from the model's by at most {found['difference']:.1e}. How to ask it: docs/onnx.md"
    )
    say_json(said)


def stop_unless_backbone(run: Run) -> None:
    """Stops where a run is none that an ONNX file can hold."""
    if run.stage != "train_backbone":
        stop(
            f"{run.folder} is a run of {run.stage}, and --export-onnx writes backbones only; pass "
            "a backbone (train_backbone.py --teacher makes one that an LM taught)"
        )
    if getattr(run, "model", None) not in GRAPHS:
        must_be_ours(run)
        stop(
            f"{run.folder} holds a model '{run.model}', and --export-onnx knows "
            f"{', '.join(GRAPHS)} only; "
            "serve this one by evaluate.py --serve, or add its graph to delrec/backbone/graphs.py"
        )


def is_missing(name: str) -> bool:
    """True for a package that cannot be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return True
    return False


def stop_unless_installed() -> None:
    """Stops where a package that the export needs is not there."""
    if missing := list(filter(is_missing, NEEDED)):
        stop(
            f"--export-onnx needs {' and '.join(missing)}, which cannot be imported here; install "
            f"with: pip install {' '.join(NEEDED)}"
        )


# ---------------------------------------------------------------- the file


def file_of(model: torch.nn.Module, run: Run, data: Data) -> "onnx.ModelProto":
    """The file's content. Inputs: history (B, T), item numbers with 0 on the left; left_out (B, S),
    item numbers that are not wanted, 0 where there are fewer; k (1,). Outputs: score and item
    (B, K), the best first, ties by the smaller number; 0 and -inf where no item is left.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = Graph()
    graph.keep(model.item.weight, "item_IE")
    seq_BL = window(graph, "history", model.history)
    x_BE = GRAPHS[run.model](graph, model, seq_BL)
    add_answer(graph, x_BE, model.bias.detach().clone())
    whole, number = TensorProto.INT64, TensorProto.FLOAT
    shapes = [
        ("history", whole, ["requests", "items"]),
        ("left_out", whole, ["requests", "left_out_items"]),
        ("k", whole, [1]),
        ("score", number, ["requests", "k"]),
        ("item", whole, ["requests", "k"]),
    ]
    values = [helper.make_tensor_value_info(*value) for value in shapes]
    weights = [numpy_helper.from_array(array, name) for name, array in graph.weights.items()]
    made = helper.make_graph(graph.nodes, run.model, values[:3], values[3:], weights)
    opset = helper.make_opsetid("", OPSET)
    file = helper.make_model(made, opset_imports=[opset], ir_version=FORMAT, producer_name="delrec")
    helper.set_model_props(file, about(run, data))
    return file


def window(graph: Graph, history: str, L: int) -> str:
    """seq_BL, the last L items of histories of any length."""
    longer = graph.add("Pad", history, np.array([0, L, 0, 0]), np.int64(0))
    end, columns = np.array([np.iinfo(np.int64).max]), np.array([1])
    return graph.add("Slice", longer, np.array([-L]), end, columns)


def add_answer(graph: Graph, x_BE: str, bias_I: torch.Tensor) -> None:
    """Adds what makes the outputs of the states: scores of all items, some of them left out, the
    best K."""
    bias_I[0] = -torch.inf  # the padding item's
    score_BI = graph.add("Gemm", x_BE, "item_IE", bias_I, transB=1)
    never_BS = graph.add("Expand", np.float32(-np.inf), graph.add("Shape", "left_out"))
    score_BI = graph.add("ScatterElements", score_BI, "left_out", never_BS, axis=1)
    most = graph.add("Min", "k", np.array([len(bias_I) - 1]))
    graph.add_many("TopK", ["score", "best_BK"], score_BI, most)
    graph.add("Where", graph.add("IsInf", "score"), np.int64(0), "best_BK", name="item")


def about(run: Run, data: Data) -> dict[str, str]:
    """What the file says of itself. ids and titles: JSON lists, an item's at its number."""
    return {
        "ids": json.dumps(raw_item_ids(data), ensure_ascii=False),
        "titles": json.dumps(list(data.titles), ensure_ascii=False),
        "model": run.model,
        "window": str(run.history),
        "dataset": data.name,
        "data_hash": data.meta["hash"],
    }


def serialised(file: "onnx.ModelProto") -> bytes:
    """The bytes of the file; one that would be too long is refused."""
    size = file.ByteSize()
    if size > MOST_BYTES:
        stop(
            f"the file would have {size / 1e9:.1f} GB, and ONNX allows 2; train the backbone "
            "with a smaller train_backbone.py --width"
        )
    return file.SerializeToString()


# ---------------------------------------------------------------- checked


def session_of(content: bytes | str) -> "onnxruntime.InferenceSession":
    """The file, ready to answer on one thread. content: its bytes, or its path."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def compared(session: "onnxruntime.InferenceSession", model: torch.nn.Module, data: Data) -> dict:
    """How far the file's best scores are from the model's: on real histories of the test part, with
    their items left out, alone and many at once."""
    samples = np.asarray(data.test)[subset(len(data.test), CHECKED, 0)]
    old_BT = histories(data, samples, 2 * model.history)
    K = min(20, data.n_items)
    parts = [*(old_BT[i : i + 1] for i in range(min(16, len(old_BT)))), old_BT]
    worst = max(difference(session, model, part, K) for part in parts)
    return {"histories": len(old_BT), "difference": worst}


def difference(
    session: "onnxruntime.InferenceSession", model: torch.nn.Module, old_BT: np.ndarray, K: int
) -> float:
    """The largest difference of the file's K best scores after some histories from the model's best
    scores, and from the model's scores of the same items; of scores above 1 their share."""
    asked = {"history": old_BT, "left_out": old_BT, "k": np.array([K])}
    score_BK, item_BK = session.run(None, asked)
    want_BI = score(model, old_BT)
    want_BI.scatter_(1, torch.from_numpy(old_BT), -torch.inf)
    best_BK, own_BK = want_BI.topk(K).values, want_BI.gather(1, torch.from_numpy(item_BK))
    worst = 0.0
    for want_BK in (best_BK.numpy(), own_BK.numpy()):
        left = np.isfinite(want_BK)
        if (left != np.isfinite(score_BK)).any():
            return np.inf
        gap = np.abs(score_BK - want_BK, where=left, out=np.zeros_like(want_BK))
        size = np.maximum(np.abs(want_BK), 1, where=left, out=np.ones_like(want_BK))
        worst = max(worst, float((gap / size).max(initial=0)))
    return worst
