"""DLLM2Rec (arXiv 2405.00338): what train_backbone.py --teacher reads of an LM's export, and its
item vectors made of titles.

The list loss L_d stands where it is minimised, in train_backbone.py.
"""

import numpy as np
import torch
import torch.nn as nn

from delrec.data.prepared import tfidf
from delrec.runtime import beside, load_run, read_json, read_npy, settle, stop


def read_export(name, data, cfg):
    """What evaluate.py --export wrote in a teacher's run folder: topk int32 (n, K), w_p (K,) + w_c
    fp32 (n, K), the fixed part of the weights (section 4.1), and Z (I+1, D), centred, of norm about
    1.
    """
    # the control: titles without an LM
    if name == "tfidf":
        if cfg.lam:
            stop(
                f"--teacher tfidf has titles' vectors but no lists, --lam is {cfg.lam}; leave "
                "--lam out"
            )
        return None, None, centred(tfidf_vectors(data))
    run = load_run(name, data)
    folder = run.folder / "export"
    settle(folder, "meta.json")
    if not (folder / "meta.json").exists():
        stop(
            f"{run.folder} holds no "
            f"{'complete ' if beside(folder, 'unfinished').exists() else ''}export; make "
            "it with: "
            f"python evaluate.py --ckpt {name} --export"
        )
    meta = read_json(folder / "meta.json")
    if (meta.get("trained"), meta.get("best_step")) != (
        getattr(run, "seconds", 0),
        getattr(run, "best_step", 0),
    ):
        stop(
            f"{folder} was made from an earlier training of {run.folder}; make it again with: "
            f"python evaluate.py --ckpt {name} --export --overwrite"
        )
    n, K = len(data.train), meta["K"]
    topk, truth, listed = (
        read_npy(folder / f"{x}.npy", shape)
        for x, shape in (("topk", (n, K)), ("truth", (n,)), ("listed", (n, K)))
    )
    asked = topk[:, 0] > 0
    if not asked.any() or topk.max() > data.n_items:
        stop(f"{folder}/topk.npy lists no item of this catalogue; make the export again")
    # position: exp(-r / beta), beta 1
    w_p = np.exp(-np.arange(1, K + 1.0))
    d = (
        1 - np.asarray(truth, np.float64)[:, None]
        if cfg.confidence == "truth"
        else 1 - np.asarray(listed, np.float64)
    )
    # confidence: exp(-d), d as far as the teacher is from the truth, or from the item
    d = (d - d[asked].mean()) / max(d[asked].std(), 1e-9)
    weight = cfg.w_position * w_p / w_p.sum() + cfg.w_confidence * np.exp(-d)
    Z = np.array(read_npy(folder / "titles.npy", (data.n_items + 1, None)), np.float32)
    return (
        np.asarray(topk),
        np.broadcast_to(weight, (n, K)).astype(np.float32) * (np.asarray(topk) > 0),
        centred(Z),
    )


def centred(Z):
    """Titles' vectors (I+1, D) around their mean, of norm about 1."""
    Z[1:] -= Z[1:].mean(0)
    return torch.from_numpy(Z / np.linalg.norm(Z[1:], axis=1).mean())


def tfidf_vectors(data, D=512):
    """Titles as their D leading directions of TF-IDF (latent semantic analysis): fp32 (I+1, D)."""
    id_IT, weight_IT, V = tfidf(data.titles)
    row, col = np.nonzero(weight_IT)
    A = torch.sparse_coo_tensor(
        np.stack([row, id_IT[row, col]]),
        weight_IT[row, col],
        (len(id_IT), V),
        check_invariants=True,
    ).coalesce()
    torch.manual_seed(0)
    u, s, _ = torch.svd_lowrank(A, q=min(D, *A.shape), niter=4)
    return (u * s).numpy()


class Titles(nn.Module):
    """e_i = b_i + eta (W z_i + c), padding zero (collaborative embedding distillation, section
    4.2).
    """

    def __init__(self, Z, E, eta):
        super().__init__()
        self.register_buffer("Z", Z, persistent=False)
        self.eta, self.c = eta, nn.Parameter(torch.zeros(E))
        self.W = nn.Parameter(
            0.02 * torch.randn(E, Z.shape[1], generator=torch.Generator().manual_seed(0))
        )

    def forward(self, b_IE):
        e_IE = b_IE + self.eta * (self.Z @ self.W.T + self.c)
        return torch.cat([torch.zeros_like(e_IE[:1]), e_IE[1:]])
