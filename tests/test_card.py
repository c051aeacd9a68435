"""A run that is shared: its card, what stands beside its weights, and the answers it gives without
data, users and runs.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from commands import edit_config
from shared_runs import KINDS, SHOPPERS

from delrec import Recommender
from delrec.data.terms import TERMS, terms_of
from delrec.serving.card_text import row_of

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


def test_a_card_finds_its_row_by_the_parents_that_a_table_names():
    own = SimpleNamespace(folder=Path("/runs/a/lm"))
    assert row_of(own, {"chance": 0, "lm": 0}) == "lm"
    assert row_of(own, {"b/lm": 0, "a/lm": 0}) == "a/lm"
    assert row_of(own, {"b/lm": 0, "/runs/a/lm": 0}) == "/runs/a/lm"
    # which of the two `lm` is nobody says; the other has a row, this one has none
    assert row_of(own, {"lm": 0, "/runs/b/lm": 0}) is row_of(own, {"b/lm": 0}) is None


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


def test_no_card_is_written_with_other_words_than_the_run_s(home, refused, tmp_path):
    import evaluate

    folder = shutil.copytree(home / "titles", tmp_path / "titles")
    edit_config(folder, prompt_words={"noun": "tea", "verb": "drank"})
    says = refused(evaluate.main, f"--ckpt {folder} --card --overwrite")
    assert "prepare them again with --noun tea --verb drank" in says


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
    wanted = []

    def fetch(name, **options):
        wanted.append((name, *options.values()))
        return str(shared["sasrec"].folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    rec = Recommender.load("somebody/shop-sasrec")
    of_it = ["*.safetensors", "*.json", "README.md"]
    assert wanted == [
        ("somebody/shop-sasrec", None, ["config.json", "items.json"]),
        ("somebody/shop-sasrec", "sasrec", of_it),  # of the commit that was looked at
    ]
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
    def fetch(name, allow_patterns, **_):
        assert "*.safetensors" not in allow_patterns  # no weight of what is no run
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="is no run shared by evaluate.py --card"):
        Recommender.load("some/model")
    shutil.copy(home / "sasrec" / "config.json", tmp_path)
    with pytest.raises(ValueError, match="it lacks items.json"):
        Recommender.load("some/model")
