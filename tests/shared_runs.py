"""Runs that are shared: a shop's runs with their cards, and copies of them as the Hub has them."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from toys import prepare_log, title_of

from delrec import Recommender
from delrec.serving.shared import FETCHED

SMALL = "--history 6 --batch 8 --micro 4 --samples 48 --evals 1 --val-samples 20"
SMALL += " --init-r 4 --target-r 2 --dropout 0"
SHOPPERS = [f"shopper-{u:03d}" for u in range(40)]


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """40 users with ids of their own, 60 items with ids of theirs; the last two are bought late."""
    rng = np.random.default_rng(1)
    rows = []
    for name in SHOPPERS:
        items = rng.choice(58, 12, replace=False) + 1
        rows += [(name, f"sku-{i:02d}", t) for t, i in enumerate(items)]
    rows += [(SHOPPERS[0], "sku-59", 900), (SHOPPERS[1], "sku-60", 900)]
    titles = {f"sku-{i:02d}": title_of(i) for i in range(1, 61)}
    return prepare_log(tmp_path_factory.mktemp("shop"), rows, titles, "shop")


@pytest.fixture(scope="session")
def home(shop, decoder, run, fp32, tmp_path_factory):
    """runs/shop of a project: a SASRec, an LM on titles, an LM on vectors, a pruned LM."""
    import evaluate
    import finetune
    import train_backbone

    runs = tmp_path_factory.mktemp("home") / "runs" / "shop"
    on = f"--dataset {shop.folder}"
    to_lm = f"{on} --backbone {runs / 'sasrec'} --llm {decoder} --soft-prompt random --k 3 {SMALL}"
    titles = "--order shuffled --calibrate"
    with fp32():
        run(train_backbone.main, f"{on} --epochs 1 --width 8 --out {runs / 'sasrec'}")
        run(finetune.main, f"{to_lm} {titles} --out {runs / 'titles'}")
        run(finetune.main, f"{to_lm} --input ids --out {runs / 'vectors'}")
        small = "--order shuffled --verbalizer mean --layers 1 --no-calibrate"
        run(finetune.main, f"{to_lm} {small} --out {runs / 'small'}")
        changed_json("config.json", set_to(calibration=0.5))(runs / "titles")
        run(evaluate.main, f"--ckpt {runs / 'titles'} --limit 20 --val-samples 10")
    return runs


def changed_json(name, change):
    """Changes a JSON file of a folder."""

    def do(folder):
        path = folder / name
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return do


def set_to(**values):
    return lambda record: record.update(values)


KINDS = ["sasrec", "titles", "vectors", "small"]


def uploaded(folder, to):
    """A copy of what is fetched of a run that was uploaded."""
    paths = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    for path in filter_repo_objects(paths, allow_patterns=FETCHED):
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / path, to / path)


def asked(rec):
    """What a recommender answers to questions of every kind that a shared one can answer."""
    names = rec.now.catalogue.lookup.titles
    rec.add_items({"sku-99": "The Golden River Returns"})
    old = [names[3], names[17], names[44]]
    scores = rec.score(old, ["sku-05", "sku-59", "sku-99"])
    return SimpleNamespace(
        best=rec.recommend(old, top=8).items,
        many=[a.items for a in rec.recommend([[names[5]], [names[9], names[2]]], top=4)],
        scores=scores.items,
        alike=rec.similar(names[7], top=5).items,
        lowers=[r.lowers for r in rec.explain(old, names[8]).reasons],
        popular=rec.recommend([], top=60).ids,
    )


@pytest.fixture(scope="session")
def shared(home, shop, decoder, run, fp32, tmp_path_factory):
    """{kind: a copy of its carded folder, its answers at home, its answers as a copy}. The data and
    the runs are out of reach for the copies.
    """
    import evaluate

    away, known = tmp_path_factory.mktemp("away"), {}
    with fp32():
        for kind in KINDS:
            said = run(evaluate.main, f"--ckpt {home / kind} --card").output
            known[kind] = SimpleNamespace(
                said=said, at_home=asked(Recommender.load(home / kind, pool=20))
            )
            uploaded(home / kind, away / kind)
        hidden = [(home, home.with_name("hidden")), (shop.folder, shop.folder.with_name("hidden"))]
        for there, gone in hidden:
            there.rename(gone)
        try:
            for kind in KINDS:
                llm = decoder if kind in ("titles", "vectors") else None
                known[kind].folder = away / kind
                known[kind].rec = Recommender.load(away / kind, llm=llm, pool=20)
                known[kind].answers = asked(known[kind].rec)
        finally:
            for there, gone in hidden:
                gone.rename(there)
    return known
