"""A prepared toy data set, and backbones of it: two made by a rule, one trained."""

import numpy as np
import pytest
from click.testing import CliRunner

COLOURS = ["Silver", "Crimson", "Hidden", "Winter", "Broken", "Golden", "Silent", "Velvet"]
THINGS = ["River", "Machine", "Orchard", "Signal", "Harbour", "Letter", "Mountain", "Carnival"]


def title_of(n):
    """Titles of two to six words; the last with a year, as films have."""
    tail = ["", " Returns", " of the North", " (1994)", " II: A Story (2001)"][n % 5]
    return f"{'The ' if n % 3 == 0 else ''}{COLOURS[n % 8]} {THINGS[(n // 8 + n) % 8]}{tail}"


def prepare_log(folder, rows, titles, name="toy", *args):
    """Rows (user, item, time) and titles {item: title} -> a prepared folder, by data/prepare.py
    itself.
    """
    from delrec.data import prepare
    from delrec.data.prepared import load_data

    raw = folder / "raw"
    raw.mkdir(parents=True)
    lines = [f"{user},{item},{time}\n" for user, item, time in rows]
    (raw / "interactions.csv").write_text("user,item,timestamp\n" + "".join(lines))

    def quoted(title):
        return '"' + title.replace('"', '""') + '"'

    lines = [f"{item},{quoted(title)}\n" for item, title in titles.items()]
    (raw / "items.csv").write_text("item,title\n" + "".join(lines), encoding="utf-8")
    places = ["--raw", str(raw), "--out", str(folder / name)]
    words = ["--core", "1", "--noun", "movie", "--verb", "watched"]
    result = CliRunner().invoke(prepare.main, [name, *places, *words, *args])
    assert result.exit_code == 0, result.output
    return load_data(str(folder / name))


@pytest.fixture(scope="session")
def make_data():
    return prepare_log


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """60 users x 14 interactions with 60 items in a random order of time; the popular items are the
    low numbers.
    """
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(3, 63)
    rows = []
    for u in range(60):
        items = rng.choice(60, 14, replace=False, p=weight / weight.sum()) + 1
        rows += [(u, i, t) for i, t in zip(items, np.sort(rng.choice(1000, 14, replace=False)))]
    seen = {r[1] for r in rows}
    rows += [(60, i, 0) for i in range(1, 61) if i not in seen]  # every item exists
    return prepare_log(tmp_path_factory.mktemp("toy"), rows, {i: title_of(i) for i in range(1, 61)})


def write_backbone(folder, data, score, h=12, model="sasrec"):
    """A finished backbone's run folder from a rule: score(samples) -> (n, I+1), any numbers.

    History and padding are never listed.
    """
    from delrec.data.prepared import candidates, users
    from delrec.runtime import write_json

    folder.mkdir(parents=True)
    for split in ("train", "val", "test"):
        samples = getattr(data, split)
        s_nI = np.array(score(samples), np.float32)
        masked = s_nI.copy()
        masked[:, 0] = -np.inf
        for row, n, begin in zip(masked, samples, data.ptr[users(data, samples)]):
            row[data.items[begin:n]] = -np.inf
        np.save(
            folder / f"topk_{split}.npy",
            np.argsort(-masked, axis=1, kind="stable")[:, :h].astype(np.int32),
        )
        np.save(
            folder / f"scores_{split}_15.npy",
            np.take_along_axis(s_nI, candidates(data, split, 15), 1),
        )
        if split != "train":
            own = np.take_along_axis(s_nI, data.items[samples].astype(np.int64)[:, None], 1)
            np.save(
                folder / f"full_{split}.npy",
                np.stack([(masked > own).sum(1), (masked == own).sum(1) - 1], 1)
                .clip(0)
                .astype(np.int32),
            )
    write_json(
        folder / "config.json",
        {
            "stage": "train_backbone",
            "model": model,
            "loss": "ce",
            "history": 10,
            "dataset": data.name,
            "data_folder": str(data.folder),
            "data_hash": data.meta["hash"],
        },
    )
    return folder


def popular(data):
    """Scores by training popularity, with small differences so that nothing ties."""
    count = (
        np.bincount(data.items[data.train], minlength=data.n_items + 1)
        + np.arange(data.n_items + 1) / 1000
    )
    return lambda samples: np.broadcast_to(count, (len(samples), data.n_items + 1))


@pytest.fixture(scope="session")
def make_backbone():
    return write_backbone


@pytest.fixture(scope="session")
def backbone(toy, tmp_path_factory):
    """A run folder of a model that ranks by popularity and calls itself SASRec."""
    return write_backbone(tmp_path_factory.mktemp("runs") / "sasrec", toy, popular(toy))


@pytest.fixture(scope="session")
def sasrec(toy, script, fp32, tmp_path_factory):
    """A real SASRec, trained for two epochs."""
    import train_backbone

    folder = tmp_path_factory.mktemp("trained") / "sasrec"
    with fp32():
        script(
            train_backbone.main,
            "--dataset",
            toy.folder,
            "--out",
            folder,
            "--epochs",
            2,
            "--width",
            16,
        )
    return folder
