"""A run that is shared: its card, what stands beside its weights, and the answers it gives without
data, users and runs.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from toys import prepare_log, title_of

from delrec import Recommender
from delrec.data.terms import TERMS, terms_of
from delrec.serving.shared import FETCHED

SMALL = "--history 6 --batch 8 --micro 4 --samples 48 --evals 1 --val-samples 20"
SMALL += " --init-r 4 --target-r 2 --dropout 0"
SHOPPERS = [f"shopper-{u:03d}" for u in range(40)]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_run_gives_the_same_answers_bit_for_bit(kind, shared):
    assert shared[kind].answers == shared[kind].at_home
    assert len(shared[kind].answers.popular) == 60
    parts = {p.name for p in shared[kind].folder.iterdir()}
    assert ("backbone" in parts) == (kind in ("titles", "small"))
    assert ("neutral.safetensors" in parts) == (kind == "titles")
    assert ("lm" in parts) == (kind == "small")


def test_a_shared_run_knows_no_user_and_says_so(shared):
    with pytest.raises(ValueError, match="shared without anybody's history.*give titles or ids"):
        shared["sasrec"].rec.recommend(user=SHOPPERS[0])
    reasons = shared["sasrec"].rec.explain(["sku-01"], "sku-02").reasons
    assert [r.together for r in reasons] == [None]


def test_a_shared_run_answers_for_users_where_its_data_are_given(shared, shop):
    rec = Recommender.load(shared["sasrec"].folder, dataset=str(shop.folder))
    assert rec.recommend(user=SHOPPERS[0]).history[-1] == "sku-59"


@pytest.mark.parametrize("kind", KINDS)
def test_no_user_and_no_interaction_stands_in_a_shared_folder(kind, shared):
    folder = shared[kind].folder
    for path in filter(Path.is_file, folder.rglob("*")):
        assert path.suffix in (".json", ".safetensors", ".md")
        assert not any(name.encode() in path.read_bytes() for name in SHOPPERS), path
    record = json.loads((folder / "items.json").read_text())
    assert {key for key in record if isinstance(record[key], list)} == {
        *("titles", "ids", "popular", "untrained")
    }


def test_what_tables_read_stays_at_home(shared, home):
    rules = (home / "sasrec" / ".gitignore").read_text().splitlines()
    assert rules[1] == "*" and not any(rule.startswith("!") and ".npy" in rule for rule in rules)
    assert {"/export/", "/folds.safetensors"} <= set(rules)


# ---------------------------------------------------------------- the card


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_shows_the_metrics_and_intervals_of_the_last_table(shared, home):
    text = card_of(shared["titles"].folder)
    result = json.loads((home / "titles" / "evaluation" / "metrics.json").read_text())
    row = result["rows"]["titles"]
    low, high = row["ndcg@10_interval"]
    assert f"{row['ndcg@10']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert f"| {row['hr@5']:.3f} |" in text and f"| {row['mrr']:.3f} |" in text
    assert result["protocol"] in text
    assert f"Chance level: HR@1 {result['chance']['hr@1']:.3f}" in text


def test_a_backbone_without_a_table_shows_what_its_training_measured(shared, home):
    text = card_of(shared["sasrec"].folder)
    test = json.loads((home / "sasrec" / "metrics.json").read_text())["test"]
    for part, name in (("candidates15", "among 15"), ("full", "over all items")):
        digits = 4 if part == "full" else 3
        cells = [f"{test[part][m]:.{digits}f}" for m in ("hr@1", "hr@5", "hr@10")]
        assert f"| {name} | {' | '.join(cells)} |" in text
    assert "| chance of 15 | 0.067 |" in text


def test_a_run_that_was_not_measured_says_how(shared):
    assert "Not measured yet: `python evaluate.py" in card_of(shared["vectors"].folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_of_a_card_is_yaml_that_the_hub_reads(kind, shared):
    text = card_of(shared[kind].folder)
    head = huggingface_hub.ModelCard(text).data.to_dict()
    assert head["license"] == "unknown" and head["library_name"] == "delrec"
    assert "sequential-recommendation" in head["tags"]
    for part in ("How to use it", "Data", "Metrics", "Commands that made it", "Licences"):
        assert f"\n## {part}\n" in text
    assert "unknown, look before you share" in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_of_a_card_say_what_the_run_was_made_with(kind, shared):
    import finetune
    import train_backbone
    from delrec.data import prepare

    block = card_of(shared[kind].folder).split("## Commands that made it\n\n```\n")[1]
    lines = block.split("```")[0].replace("\\\n", " ").splitlines()
    commands = [line.split() for line in lines]
    assert [c[1] for c in commands][:2] == ["data/prepare.py", "train_backbone.py"]
    assert len(commands) == (3 if kind == "sasrec" else 4)
    prepare.main.make_context("prepare.py", commands[0][2:])
    made = train_backbone if kind == "sasrec" else finetune
    context = made.main.make_context("script", commands[-2][2:])
    config = json.loads((shared[kind].folder / "config.json").read_text())
    unlike = {k for k, v in context.params.items() if config[k] != v}
    assert unlike <= {"dataset", "out", "llm", "backbone", "overwrite"} | (
        {"verbalizer", "calibrate"} if kind == "vectors" else set()  # --input ids fixes them
    )
    assert context.params["out"] == f"shop/{kind}"


def test_a_card_that_is_there_is_kept_unless_it_may_be_replaced(home, run, refused):
    import evaluate

    readme = home / "sasrec" / "README.md"
    text = card_of(home / "sasrec")
    readme.write_text(text + "my own words\n")
    says = refused(evaluate.main, f"--ckpt {home / 'sasrec'} --card")
    assert "--overwrite writes it anew" in says
    assert "my own words" in readme.read_text()
    run(evaluate.main, f"--ckpt {home / 'sasrec'} --card --overwrite")
    assert card_of(home / "sasrec") == text


def test_data_that_may_not_be_redistributed_are_said_loudly(home, run, shop):
    import evaluate

    meta = shop.folder / "meta.json"
    text = meta.read_text()
    record = json.loads(text) | {"source": "MovieLens, ratings.dat, movies.dat"}
    meta.write_text(json.dumps(record))
    try:
        said = run(evaluate.main, f"--ckpt {home / 'sasrec'} --card --overwrite").output
    finally:
        meta.write_text(text)
    card = card_of(home / "sasrec")
    run(evaluate.main, f"--ckpt {home / 'sasrec'} --card --overwrite")
    assert "WARNING: shop may not be redistributed without permission" in said
    assert "> **WARNING: not to be redistributed without permission.**" in card
    assert "license: other" in card


def test_the_terms_of_known_data_are_told_apart():
    from delrec.data.sources import SOURCES

    assert {*TERMS, "ml-1m", "ml-latest-small"} == set(SOURCES)
    assert terms_of({"name": "ml-100k"}).forbidden and terms_of({"name": "ml-1m"}).forbidden
    assert terms_of({"name": "films", "source": "MovieLens, ratings.dat"}).forbidden
    assert not terms_of({"name": "ml-team-shop", "source": "orders.csv"}).forbidden
    assert not terms_of({"name": "beauty"}).forbidden and terms_of({"name": "beauty"}).known
    assert not terms_of({"name": "steam"}).known and not terms_of({"name": "my-shop"}).known


def test_what_is_not_known_is_printed(shared):
    assert "the terms of shop are not known here" in shared["sasrec"].said
    assert re.search(r"config\.json.* name folders of this machine", shared["titles"].said)
    assert "hf upload OWNER/NAME" in shared["sasrec"].said


# ---------------------------------------------------------------- the Hub


def test_a_hub_id_is_fetched_and_answers_from_what_it_brought(shared, monkeypatch):
    wanted = {}

    def fetch(name, **options):
        wanted.update(options, name=name)
        return str(shared["sasrec"].folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    rec = Recommender.load("somebody/shop-sasrec")
    assert wanted["name"] == "somebody/shop-sasrec"
    assert wanted["allow_patterns"] == ["*.safetensors", "*.json", "README.md"]
    assert rec.recommend([], top=60).ids == shared["sasrec"].answers.popular
    with pytest.raises(ValueError, match="without anybody's history"):
        rec.recommend(user=SHOPPERS[0])  # although the data stand where it says


def test_a_hub_id_that_cannot_be_fetched_is_one_sentence(monkeypatch):
    def fail(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the Hub\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="nobody/nothing is no run here .*cannot reach") as refused:
        Recommender.load("nobody/nothing")
    assert "\n" not in str(refused.value)


def test_a_hub_id_of_something_else_is_one_sentence(monkeypatch, tmp_path, home):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ValueError, match="is no run shared by evaluate.py --card"):
        Recommender.load("some/model")
    shutil.copy(home / "sasrec" / "config.json", tmp_path)
    with pytest.raises(ValueError, match="it lacks items.json"):
        Recommender.load("some/model")


# ---------------------------------------------------------------- somebody else's files


def without_rows(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"item.weight": tensors["item.weight"][:-1].clone()}, path)


def other_neutral(folder):
    save_file({"neutral": torch.zeros(5)}, folder / "neutral.safetensors")


HOSTILE = {
    "an id twice": ("sasrec", changed_json("items.json", set_to(ids=["a"] * 60)), "an id twice"),
    "too few ids": ("sasrec", changed_json("items.json", set_to(ids=["a"])), "60 titles, but 1 id"),
    "titles of two lines": (
        "sasrec",
        changed_json("items.json", lambda r: r["titles"].__setitem__(0, "a\nb")),
        "is no title of one line",
    ),
    "no texts": ("sasrec", changed_json("items.json", set_to(titles=[1] * 60)), "are no texts"),
    "no words": ("sasrec", changed_json("items.json", set_to(words={})), "are no texts"),
    "a bad order": (
        "sasrec",
        changed_json("items.json", set_to(popular=[1] * 60)),
        "order of popularity",
    ),
    "an item out of range": (
        "sasrec",
        changed_json("items.json", set_to(untrained=[61])),
        "untrained items",
    ),
    "another hash": ("sasrec", changed_json("items.json", set_to(hash="0")), "is of other data"),
    "no JSON": (
        "sasrec",
        lambda f: (f / "items.json").write_text("[" * 9),
        "cannot be read as JSON",
    ),
    "a list": ("sasrec", lambda f: (f / "items.json").write_text("[]"), "it lacks dataset, hash"),
    "weights of other shapes": ("sasrec", without_rows, "holds item.weight of the shape [60, 8]"),
    "a huge model": (
        "sasrec",
        changed_json("config.json", set_to(width=10**9)),
        "expected whole numbers up to",
    ),
    "an unknown model": (
        "sasrec",
        changed_json("config.json", set_to(model="../evil")),
        "expected one of sasrec",
    ),
    "a width that is no number": (
        "sasrec",
        changed_json("config.json", lambda r: r.pop("width")),
        "cannot be opened",
    ),
    "a pickle for weights": (
        "sasrec",
        lambda f: torch.save({}, f / "model.safetensors"),
        "cannot be read as safetensors",
    ),
    "neutral scores of another size": ("titles", other_neutral, "does not hold the neutral scores"),
    "another backbone's items": (
        "titles",
        changed_json("backbone/config.json", set_to(n_items=7)),
        "of 7 items, expected one of",
    ),
    "another kind of adapter": (
        "titles",
        changed_json("adapter/adapter_config.json", set_to(peft_type="XLORA")),
        "expected ADALORA",
    ),
    "settings that are none": (
        "titles",
        changed_json("config.json", set_to(settings=[])),
        "cannot be opened",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_broken_shared_folder_is_one_sentence(case, shared, decoder, tmp_path, on_cpu):
    kind, spoil, says = HOSTILE[case]
    folder = shutil.copytree(shared[kind].folder, tmp_path / "copy")
    changed_json("config.json", set_to(data_folder="/nowhere"))(folder)
    spoil(folder)
    with pytest.raises(ValueError) as refused:
        Recommender.load(folder, llm=None if kind == "sasrec" else decoder)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_no_path_of_a_shared_folder_is_followed(shared, decoder, tmp_path, on_cpu):
    folder = shutil.copytree(shared["titles"].folder, tmp_path / "copy")
    aside = shutil.copytree(folder / "backbone", tmp_path / "aside")
    shutil.rmtree(folder / "backbone")
    places = {"data_folder": "../aside", "backbone_run": str(aside), "llm": "../../lm"}
    changed_json("config.json", set_to(**places))(folder)
    with pytest.raises(ValueError, match="an LM in a folder of whoever shared it.*llm=FOLDER"):
        Recommender.load(folder)
    with pytest.raises(ValueError, match="no backbone in .*copy/backbone"):
        Recommender.load(folder, llm=decoder, pool=20)


def test_data_are_not_looked_for_upwards(shared, shop, tmp_path):
    folder = shutil.copytree(shared["sasrec"].folder, tmp_path / "copy")
    changed_json("config.json", set_to(data_folder=f"{tmp_path}/../{tmp_path.name}/data"))(folder)
    shutil.copytree(shop.folder, tmp_path / "data")
    assert Recommender.load(folder).now.catalogue.data.n_users == 0


def test_a_copy_beside_the_data_knows_its_users_and_answers_by_its_own_parts(shared, shop, decoder):
    folder = shared["titles"].folder  # its data stand where it says; so they do for a colleague
    config = (folder / "config.json").read_text()
    changed_json("config.json", set_to(backbone_run="/nowhere"))(folder)
    try:
        rec = Recommender.load(folder, llm=decoder, pool=20)
    finally:
        (folder / "config.json").write_text(config)
    assert rec.run.backbone_run == str(folder / "backbone")
    assert rec.recommend(user=SHOPPERS[0], top=3).history[-1] == "sku-59"


def test_the_own_lm_of_a_shared_run_has_all_its_weights_inside(shared, tmp_path, on_cpu):
    folder = shutil.copytree(shared["titles"].folder, tmp_path / "copy")
    changed_json("config.json", set_to(data_folder="/nowhere"))(folder)
    (folder / "lm").mkdir()
    with pytest.raises(ValueError, match="no weights as safetensors"):
        Recommender.load(folder)
    (folder / "lm" / "model.safetensors").touch()
    index = {"weight_map": {"a": "../../other.safetensors"}}
    (folder / "lm" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names weights outside of"):
        Recommender.load(folder)


def test_another_lm_than_the_one_it_was_trained_on_is_refused(shared, deep, tmp_path, on_cpu):
    folder = shutil.copytree(shared["titles"].folder, tmp_path / "copy")
    changed_json("config.json", set_to(data_folder="/nowhere"))(folder)
    with pytest.raises(ValueError, match="was trained on another LM"):
        Recommender.load(folder, llm=deep)
    assert Path(folder / "items.json").exists()
