"""Shared folders that are broken, hostile, or not what they say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_runs import SHOPPERS, changed_json, set_to

import evaluate
from delrec import Recommender

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


def beside_leftovers(folder):
    """A folder and what a killed preparation would leave beside it; what stands there now."""
    for name in (folder.name, f"{folder.name}.replaced", f"{folder.name}-b.unfinished"):
        (folder.parent / name).mkdir(parents=True)
        (folder.parent / name / "meta.json").write_text('{"hash": "another"}')
    return sorted(path.name for path in folder.parent.iterdir())


@pytest.mark.parametrize("end", ["", "-b"])
@pytest.mark.parametrize("key", ["data_folder", "dataset"])
def test_no_folder_that_a_shared_one_names_is_touched(key, end, shared, tmp_path, script):
    folder = shutil.copytree(shared["sasrec"].folder, tmp_path / "copy")
    victim = tmp_path / "far" / "victim"
    there = beside_leftovers(victim)
    changed_json("config.json", set_to(**{key: f"{victim}{end}"}))(folder)
    rec = Recommender.load(folder)
    assert rec.recommend([], top=60).ids == shared["sasrec"].answers.popular
    if key == "data_folder":
        script(evaluate.main, "--ckpt", folder, "--history", "x", code=1)
    assert sorted(path.name for path in victim.parent.iterdir()) == there


@pytest.mark.parametrize(
    "change, says",
    [(set_to(model="../evil"), "expected one of sasrec"), (set_to(n_items=7), "of 7 items, exp")],
)
def test_what_a_shared_run_holds_is_checked_also_where_its_data_are(
    change, says, shared, home, tmp_path
):
    copy = shutil.copytree(home, tmp_path / "runs" / "shop") / "sasrec"  # as if it was made here
    changed_json("config.json", change)(copy)
    with pytest.raises(ValueError, match=says):
        Recommender.load(copy)


def test_a_copy_is_not_at_home_because_its_data_are_here(shared, shop, decoder, tmp_path, on_cpu):
    folder = shutil.copytree(shared["titles"].folder, tmp_path / "copy")
    shutil.rmtree(folder / "backbone")
    with pytest.raises(ValueError, match="an LM in a folder of whoever shared it"):
        Recommender.load(folder, dataset=str(shop.folder))
    rec = Recommender.load(folder, dataset=str(shop.folder), llm=decoder, pool=0)
    assert rec.run.backbone_run == str(folder / "backbone")


def test_data_are_not_looked_for_upwards(shared, shop, tmp_path):
    folder = shutil.copytree(shared["sasrec"].folder, tmp_path / "copy")
    changed_json("config.json", set_to(data_folder=f"{tmp_path}/../{tmp_path.name}/data"))(folder)
    shutil.copytree(shop.folder, tmp_path / "data")
    assert Recommender.load(folder).now.catalogue.data.n_users == 0


def test_a_copy_beside_the_data_knows_its_users_and_answers_by_its_own_parts(
    shared, shop, decoder, tmp_path, on_cpu
):
    folder = shutil.copytree(shared["titles"].folder, tmp_path / "runs" / "copy")
    shutil.copytree(shop.folder, tmp_path / "data" / "shop")  # so they do for a colleague
    changed_json("config.json", set_to(data_folder="data/shop"))(folder)
    rec = Recommender.load(folder, llm=decoder, pool=20)
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
