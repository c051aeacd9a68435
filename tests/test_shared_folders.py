"""Shared folders that are broken, hostile, or not what they say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_runs import SHOPPERS, changed_json, set_to

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
