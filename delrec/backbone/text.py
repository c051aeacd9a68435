"""Vectors of titles: where they come from (train_backbone.py --text), and their geometry.

Sources are TF-IDF, MiniLM, an LM's export and any .npy file; several stand side by side
(tfidf+minilm). What is fitted (mean, scale, whitening, directions) is fitted on the items that
occur in training, and applied to all: an item that nobody had yet changes nothing. How the vectors
enter a model: text_ways.py.

Names: I items (ids 1..I, 0 pads), D width of the vectors, K directions.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.backbone.exports import export_folder
from delrec.backbone.rec_pca import turned_by_graph
from delrec.data.counts import seen_in_training
from delrec.data.others import order_of_others
from delrec.data.prepared import Data
from delrec.data.words import Words
from delrec.places import sources
from delrec.processes import Ranks
from delrec.runtime import folder_of, load_run, read_npy, stop

WORDS = ("tfidf", "minilm")  # sources that are no file and no run
FIRST_WIDE = ("start", "alphafuse")  # ways that take as many directions as an item vector has
SMALL = 1e-5  # added to every variance, as a share of the largest, before whitening
DUST = 1e-6  # what is left of like vectors without their mean is rounding, as a share of their norm
NONE = 1e-9  # a direction with less than this share of the largest variance has none


@dataclass
class Text:
    """The titles' vectors as their sources give them."""

    source: str  # as it was named
    parts: list[np.ndarray | None]  # float32 (I+1, D) of each source; None: TF-IDF, fitted itself
    made: dict[str, str]  # what tells read files apart, for a run that goes on

    def fitted(self, data: Data, cfg: SimpleNamespace) -> np.ndarray:
        """The vectors that enter a model, float32 (I+1, D): fitted on the items that occur in
        data.train."""
        trained = seen_in_training(data)
        parts = [centred(part, trained, self.source) for part in self.vectors(data)]
        Z_ID = np.concatenate(parts, 1)
        wide = cfg.width if cfg.text_in in FIRST_WIDE else cfg.text_width
        whiten = cfg.text_whiten
        if whiten is None:  # AlphaFuse standardises
            whiten = float(cfg.text_in == "alphafuse")
        if cfg.text_graph:
            Z_ID = turned_by_graph(Z_ID, data, cfg.text_graph, wide or cfg.width)
        else:
            Z_ID = turned(Z_ID, trained, whiten, wide)
        if cfg.permute_text:
            Z_ID = permuted(Z_ID, trained)
        return Z_ID

    def vectors(self, data: Data) -> list[np.ndarray]:
        """The sources' vectors, float32 (I+1, D) each: TF-IDF of the items that occur in
        data.train."""
        return [tfidf_vectors(data) if part is None else part for part in self.parts]

    def about(self, data: Data) -> dict[str, float]:
        """What a run's record says of the vectors: how many numbers, and how far they all point in
        one direction."""
        Z_ID = np.concatenate(self.vectors(data), 1)
        cosine = mean_cosine(Z_ID[seen_in_training(data)])
        return {"text_numbers": Z_ID.shape[1], "text_cosine": round(cosine, 3)}


def ending_of(cfg: SimpleNamespace) -> str:
    """How the name of a run ends that was given titles or a teacher."""
    return "-taught" if cfg.teacher else "-text" if cfg.text else ""


def said(about: dict[str, float], cfg: SimpleNamespace) -> str:
    """What the titles' vectors are, in a line. about: see Text.about."""
    way = f", --text-in {cfg.text_in}" if cfg.text_in else ""
    line = (
        f"titles as {about['text_numbers']} numbers ({cfg.text or cfg.teacher}{way}); two of them "
        f"have a mean cosine of {about['text_cosine']:.2f}"
    )
    # AlphaFuse whitens by itself, and --text-graph takes no --text-whiten
    as_they_come = cfg.text_whiten is None and cfg.text_in != "alphafuse" and not cfg.text_graph
    if about["text_cosine"] > 0.8 and as_they_come:
        line += ", so they say little apart from each other: try --text-whiten .5"
    return line + (", given to other items (--permute-text)" if cfg.permute_text else "")


# ---------------------------------------------------------------- sources


def sha256_of(*arrays: np.ndarray) -> str:
    """16 hex digits that tell arrays of one shape and kind apart."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def read_text(
    cfg: SimpleNamespace, data: Data, ranks: Ranks, minilm: Callable[[Data, Ranks], np.ndarray]
) -> Text | None:
    """The titles' vectors of --text, else of --teacher; None where neither is given, or --eta 0
    leaves them out. minilm(data, ranks): MiniLM's, which only the LM's side can make."""
    source = cfg.text or cfg.teacher
    if not (source and cfg.eta):
        return None
    parts, made = [], {}
    for name in names_of(source):
        if name == "tfidf":
            Z_ID = None
        elif name == "minilm":
            Z_ID = minilm(data, ranks)
        else:
            Z_ID = read_vectors(name, data)
            made[f"vectors of {name}"] = sha256_of(Z_ID)
        parts.append(Z_ID)
    text = Text(source, parts, made)
    if cfg.text_width:
        numbers = sum(part.shape[1] for part in text.vectors(data))
        if cfg.text_width > numbers:
            stop(
                f"--text-width {cfg.text_width} is more than the {numbers} numbers that a title "
                f"has from {source}; lower it, or leave it out"
            )
    return text


def names_of(source: str) -> list[str]:
    """The sources that a + joins; the name of a run or of a file may hold one itself."""
    return sources(source, lambda name: os.path.exists(name) or folder_of("runs", name).exists())


def must_be_there(cfg: SimpleNamespace) -> None:
    """Stops where --text or --teacher names no run and no file; asked before the data are read.
    With --resume whoever reads them asks: a finished run needs neither any more."""
    if cfg.resume:
        return
    named = names_of(cfg.text) if cfg.text else []
    for name in {*named, *([cfg.teacher] if cfg.teacher else [])} - {*WORDS}:
        if not name:
            stop("--text has a + with nothing beside it; join two sources, as in tfidf+minilm")
        elif name.endswith(".npy"):
            read_npy(Path(name))
        else:
            load_run(name)


def read_vectors(name: str, data: Data) -> np.ndarray:
    """The titles' vectors float32 (I+1, D) of an .npy file or of an LM's export."""
    if name.endswith(".npy"):
        return file_vectors(Path(name), data)
    path = export_folder(load_run(name, data), name) / "titles.npy"
    return file_vectors(path, data)


def file_vectors(path: Path, data: Data) -> np.ndarray:
    """The vectors of a file of I rows, or of I+1 with the padding's first: float32 (I+1, D)."""
    array, n = read_npy(path), data.n_items
    if array.ndim != 2 or len(array) not in (n, n + 1) or not array.shape[1]:
        stop(
            f"{path} has shape {array.shape}, expected {n} rows (an item each, in the order of "
            f"{data.folder}/titles.txt) or {n + 1} with the padding's first; it belongs to other "
            "data, make it again"
        )
    if array.dtype.kind not in "fiu":
        stop(f"{path} holds no numbers ({array.dtype}), expected a vector of each title")
    Z_ID = np.zeros((n + 1, array.shape[1]), np.float32)
    with np.errstate(over="ignore"):  # what is too large for fp32 is not finite then
        Z_ID[1:] = array[-n:]
    if not np.isfinite(Z_ID).all():
        stop(f"{path} holds numbers that are not finite, expected finite ones; make it again")
    return Z_ID


def tfidf_vectors(data: Data, D: int = 512) -> np.ndarray:
    """Titles as D directions of TF-IDF (latent semantic analysis): fp32 (I+1, D). The words, their
    weights and the leading directions are those of the items that occur in training."""
    trained = seen_in_training(data)
    words = Words(["", *(data.titles[i] for i in trained)])
    id_IT, weight_IT = words.bags(data.titles)

    def sparse(of):
        row, col = np.nonzero(weight_IT[of])
        at = np.stack([row, id_IT[of][row, col]])
        weight, shape = weight_IT[of][row, col], (len(id_IT[of]), len(words))
        return torch.sparse_coo_tensor(at, weight, shape, check_invariants=True).coalesce()

    A_nV = sparse(trained)
    with torch.random.fork_rng(devices=[]):  # the model's own draws stay what they are
        torch.manual_seed(0)
        _, _, direction_VD = torch.svd_lowrank(A_nV, q=min(D, *A_nV.shape), niter=4)
    return (sparse(slice(None)) @ direction_VD).numpy()


# ---------------------------------------------------------------- geometry


def centred(Z_ID: np.ndarray, trained: np.ndarray, source: str = "the text") -> np.ndarray:
    """The vectors around the mean of the trained items, of norm about 1 there; padding is 0.
    trained: the numbers of those items."""
    Z_ID = Z_ID.astype(np.float64)  # whose squares neither overflow nor vanish
    before = np.linalg.norm(Z_ID[trained], axis=1).mean()
    Z_ID -= Z_ID[trained].mean(0)
    norm = np.linalg.norm(Z_ID[trained], axis=1).mean()
    if not norm > DUST * before:
        stop(
            f"{source} gives every title that occurs in training the same vector, so it says "
            "nothing of an item; use another --text, or none"
        )
    Z_ID /= norm
    Z_ID[0] = 0
    return Z_ID.astype(np.float32)


def directions(Z_ID: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(U (D, K), s (K,)): the directions of the trained items' covariance U diag(s) U', most
    variance first; those without any are left out, because nothing can be learnt along them.

    Of U and -U the one is taken whose largest number is positive: the same on every machine."""
    Z_nD = Z_ID[trained].astype(np.float64)
    s_D, U_DD = np.linalg.eigh(Z_nD.T @ Z_nD / len(Z_nD))
    s_D, U_DD = s_D[::-1], U_DD[:, ::-1]
    has_some = s_D > NONE * s_D[0]
    s_K, U_DK = s_D[has_some], U_DD[:, has_some]
    largest_K = U_DK[np.abs(U_DK).argmax(0), np.arange(len(s_K))]
    return U_DK * np.sign(largest_K), s_K


def turned(
    Z_ID: np.ndarray, trained: np.ndarray, whiten: float, wide: int | None = None
) -> np.ndarray:
    """Softly whitened vectors Z U (s + eps)^(-g/2) U' (g = whiten; 0 leaves them, 1 makes the
    trained items' covariance a multiple of the identity; WhitenRec, arXiv 2402.10602, is g = 1), or
    with `wide` the leading directions Z U (s + eps)^(-g/2) alone (PCA). The mean norm stays.

    Z_ID: centred on the trained items."""
    if not whiten and wide is None:
        return Z_ID
    U_DK, s_K = directions(Z_ID, trained)
    map_DK = U_DK * (s_K + SMALL * s_K[0]) ** (-whiten / 2)
    map_DX = map_DK @ U_DK.T if wide is None else map_DK[:, :wide]
    new_IX = Z_ID @ map_DX
    before, after = (np.linalg.norm(a[trained], axis=1).mean() for a in (Z_ID, new_IX))
    return (new_IX * (before / after)).astype(np.float32)


def permuted(Z_ID: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The vectors Z at other items: the control without meaning. Trained items change among
    themselves, and so do the others, so that the spectrum stays.

    The order of the items is always the same, so in a fold, which has fewer trained items, most
    items get the vector that they have in the full model."""
    is_trained = np.isin(np.arange(len(Z_ID)), trained)
    return Z_ID[order_of_others(len(Z_ID) - 1, is_trained)]


def mean_cosine(Z_nD: np.ndarray) -> float:
    """The mean cosine of two different vectors of n; 0 where there are no two."""
    unit_nD = Z_nD / np.maximum(np.linalg.norm(Z_nD, axis=1, keepdims=True), 1e-12)
    n, squares = len(unit_nD), float((unit_nD**2).sum())
    together = float((unit_nD.sum(0, dtype=np.float64) ** 2).sum())
    return (together - squares) / max(n * (n - 1), 1)
