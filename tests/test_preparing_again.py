"""A preparation is never destroyed by another one: runs that were made from it still find it."""

import contextlib
import shlex
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from logs import random_log, write
from run_folders import QUICK, Killed, contents, dying, names

import evaluate
import train_backbone
from delrec import Recommender, runtime
from delrec.data import prepare
from delrec.data.prepared import (
    candidates,
    item_columns,
    load_data,
    load_data_of,
    raw_item_ids,
    raw_user_ids,
)
from delrec.lm.ranker import open_run
from delrec.lm.soft_prompt import prompt_run_of
from delrec.runtime import load_run, write_json
from delrec.training.run_folders import finish_run, start_run


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """shop(flags..) prepares data/shop under a root of its own; returns click's result."""
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    raw = write(tmp_path / "raw", random_log(1500))

    def run(*args):
        return CliRunner().invoke(
            prepare.main, ["shop", "--raw", str(raw), "--core", "1", *map(str, args)]
        )

    return run


def test_preparing_again_with_the_same_result_replaces_nothing(shop, tmp_path):
    assert shop().exit_code == 0
    inode = (tmp_path / "data" / "shop" / "items.npy").stat().st_ino
    again = shop()
    assert again.exit_code == 0 and "holds this preparation already" in again.output
    assert (tmp_path / "data" / "shop" / "items.npy").stat().st_ino == inode
    assert names(tmp_path / "data") == ["shop"]
    other = shop("--noun", "product")  # the hash does not hold the words of the prompts
    assert other.exit_code == 1 and "other words" in other.output and "--overwrite" in other.output
    assert shop("--noun", "product", "--overwrite").exit_code == 0
    assert load_data("shop").meta["words"]["noun"] == "product"
    assert names(tmp_path / "data") == ["shop"]


def test_a_new_preparation_keeps_the_old_one_while_runs_use_it(shop, script, on_cpu, tmp_path):
    assert shop().exit_code == 0
    old = load_data("shop").meta["hash"]
    script(train_backbone.main, "--dataset", "shop", *QUICK)
    before = contents(tmp_path / "data" / "shop")
    refused = shop("--seed", 1)
    assert refused.exit_code == 1
    assert old in refused.output
    assert "--overwrite replaces it" in refused.output
    assert f"shop@{old}" in refused.output
    assert contents(tmp_path / "data" / "shop") == before and names(tmp_path / "data") == ["shop"]
    done = shop("--seed", 1, "--overwrite")
    assert done.exit_code == 0 and "the earlier one stays" in done.output
    assert names(tmp_path / "data") == ["shop", f"shop@{old}"]
    assert contents(tmp_path / "data" / f"shop@{old}") == before
    assert load_data(f"shop@{old}").meta["hash"] == old != load_data("shop").meta["hash"]
    assert load_data_of(load_run("shop/sasrec")).folder == tmp_path / "data" / f"shop@{old}"
    said = script(evaluate.main, "--ckpt", "shop/sasrec").output
    assert f"shop@{old}" in said.split("\n")[0] and "that one is used" in said
    says = script(evaluate.main, "--ckpt", "shop/sasrec", "--dataset", "shop", code=1).error
    assert "another preparation" in says
    assert f"--dataset {tmp_path / 'data' / f'shop@{old}'}" in says
    second = load_data("shop").meta["hash"]  # no run knows the second one: it goes
    assert shop("--seed", 2, "--overwrite").exit_code == 0
    assert names(tmp_path / "data") == ["shop", f"shop@{old}"]
    assert load_data("shop").meta["hash"] not in (old, second)
    assert CliRunner().invoke(prepare.main, [f"shop@{old}", "--check"]).exit_code == 0


def test_runs_of_an_lm_are_asked_with_the_words_of_their_training(shop, alone, tmp_path):
    assert shop("--verb", "gave someone").exit_code == 0
    for stage in ("distill", "train_backbone"):
        folder = tmp_path / "runs" / stage
        flags = dict(soft_prompt=str(folder), input="titles", settings={})
        cfg = SimpleNamespace(llm=str(tmp_path / "none"), **flags)
        finish_run(folder, start_run(folder, stage, cfg, load_data("shop"), alone)[1])
    run = load_run(tmp_path / "runs" / "distill")
    again = "--noun item --verb 'gave someone'"

    def refused(call, *args):
        try:
            call(*args)
        except click.ClickException as bad:
            return f"prepare them again with {again} (" in bad.message
        return False

    def opened(run):
        return open_run(run, load_data("shop"), alone.device)

    cfg = SimpleNamespace(soft_prompt=str(run.folder), input="titles", backbone=None)
    for flags, differ in (("--noun tea --verb drank", True), (again, False)):
        assert shop(*shlex.split(flags), "--overwrite").exit_code == 0
        assert refused(opened, run) == differ
        assert refused(prompt_run_of, cfg, load_data("shop")) == differ
    shop("--noun", "tea", "--overwrite")
    del run.prompt_words  # of an earlier version
    assert not refused(opened, run)


def with_kinds(raw):
    """Gives the table of titles a further column: every second item is odd."""
    head, *lines = (raw / "items.csv").read_text().splitlines()
    kinds = [f"{line},{('even', 'odd')[n % 2]}" for n, line in enumerate(lines)]
    (raw / "items.csv").write_text("\n".join([f"{head},kind", *kinds]) + "\n")


def of_its_log(rec):
    """What a recommender says that only the log it was trained on tells."""
    before = rec.recommend(users=["7", "8"], top=3)
    odd = rec.recommend(ids=["3"], where={"kind": "odd"}, top=3)
    rec.add_items({"new": "Title 3000"})
    after = rec.recommend(users=["7", "8"], where={"kind": ["odd", ""]}, top=3)
    assert not before[0].popular
    return before, odd, after


def test_a_service_and_what_is_read_late_keep_to_the_log_that_they_began_with(
    shop, script, on_cpu, tmp_path
):
    with_kinds(tmp_path / "raw")
    assert shop().exit_code == 0
    script(train_backbone.main, "--dataset", "shop", *QUICK)
    wanted = of_its_log(Recommender.load("shop/sasrec"))
    rec, data = Recommender.load("shop/sasrec"), load_data("shop")
    late = (raw_user_ids(data), raw_item_ids(data), item_columns(data))
    some = candidates(data, "test", 15)
    # as many users and items, under each other's names
    write(
        tmp_path / "raw",
        [(59 - u, 299 - i, t) for u, i, t in (map(int, row) for row in random_log(1500))],
    )
    assert shop("--overwrite").exit_code == 0
    assert load_data("shop").n_users == data.n_users and load_data("shop").n_items == data.n_items
    assert of_its_log(rec) == wanted
    assert (raw_user_ids(data), raw_item_ids(data), item_columns(data)) == late
    assert (candidates(data, "test", 15) == some).all()
    (tmp_path / "data" / f"shop@{data.meta['hash']}").rename(tmp_path / "gone")
    with pytest.raises(click.ClickException, match="which is not kept; start it again"):
        raw_user_ids(data)
    assert rec.recommend(user="7", top=3) is not None
    rec.add_items({"newer": "Title 3001"})


def test_both_splits_stand_beside_each_other_with_their_own_runs(shop, script, on_cpu, tmp_path):
    assert shop().exit_code == 0
    script(train_backbone.main, "--dataset", "shop", *QUICK)
    before = contents(tmp_path / "data" / "shop"), contents(tmp_path / "runs" / "shop")
    other = tmp_path / "data" / "shop-leave-one-out"
    refused = shop("--split", "leave-one-out")
    assert refused.exit_code == 1
    assert f"--out {other} puts this leave-one-out split beside it" in refused.output
    assert shop("--split", "leave-one-out", "--out", other).exit_code == 0
    script(train_backbone.main, "--dataset", "shop-leave-one-out", *QUICK)
    for name, split in (("shop", "temporal"), ("shop-leave-one-out", "leave-one-out")):
        data, trained = load_data(name), load_run(f"{name}/sasrec")
        assert data.meta["split"] == split and data.name == "shop"
        assert trained.data_hash == data.meta["hash"]
        script(evaluate.main, "--ckpt", f"{name}/sasrec", "--out", tmp_path / name)
        assert f"{split} split" in (tmp_path / name / "table.txt").read_text()
    assert names(tmp_path / "data") == names(tmp_path / "runs") == ["shop", "shop-leave-one-out"]
    after = contents(tmp_path / "data" / "shop"), contents(tmp_path / "runs" / "shop")
    assert after[0] == before[0] and before[1].items() <= after[1].items()  # and ranks_test_15.npy
    mixed = script(evaluate.main, "--ckpt", "shop/sasrec", "shop-leave-one-out/sasrec", code=1)
    assert "was trained on another preparation of shop" in mixed.error


def test_a_killed_run_keeps_its_preparation_too(shop, script, on_cpu, interrupted, tmp_path):
    assert shop().exit_code == 0
    old = load_data("shop").meta["hash"]
    interrupted(lambda: script(train_backbone.main, "--dataset", "shop", *QUICK), 3)
    assert shop("--seed", 1, "--overwrite").exit_code == 0
    assert (tmp_path / "data" / f"shop@{old}").is_dir()


@pytest.mark.parametrize("runs", ["far/runs", "here/runs"])
def test_runs_beside_the_data_or_in_the_current_folder_keep_it(shop, tmp_path, monkeypatch, runs):
    out = tmp_path / "far" / "data" / "shop"
    assert shop("--out", out).exit_code == 0
    old = load_data(str(out)).meta["hash"]
    (tmp_path / "here").mkdir()
    (tmp_path / runs).mkdir()
    write_json(tmp_path / runs / "config.json", {"data_hash": old})
    monkeypatch.chdir(tmp_path / "here")
    assert shop("--out", out, "--seed", 1, "--overwrite").exit_code == 0
    assert load_data(f"{out}@{old}").meta["hash"] == old


@pytest.mark.parametrize("n", range(3))
def test_a_preparation_that_dies_at_any_rename_leaves_a_whole_one(
    shop, script, on_cpu, tmp_path, n
):
    assert shop().exit_code == 0
    old = load_data("shop").meta["hash"]
    (tmp_path / "runs").mkdir()
    write_json(tmp_path / "runs" / "config.json", {"data_hash": old})
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, n)
        with contextlib.suppress(Killed):
            shop("--seed", 1, "--overwrite")
    data = load_data("shop")
    assert CliRunner().invoke(prepare.main, ["shop", "--check"]).exit_code == 0
    assert data.meta["hash"] == old or load_data(f"shop@{old}").meta["hash"] == old


@pytest.mark.parametrize("flag", ["--interactions", "--items"])
def test_a_file_in_the_folder_to_be_written_is_refused_and_stays(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    raw = write(tmp_path / "raw", random_log(1500))
    files = {"--interactions": raw / "interactions.csv", "--items": raw / "items.csv"}

    def shop(*more):
        words = [str(word) for pair in files.items() for word in pair]
        return CliRunner().invoke(prepare.main, ["shop", "--core", "1", *words, *more])

    assert shop().exit_code == 0
    inside = tmp_path / "data" / "shop" / files[flag].name
    files[flag] = files[flag].rename(inside)
    result = shop("--seed", "1", "--overwrite")
    assert result.exit_code == 1 and f"the raw files {inside} lie in the folder" in result.output
    assert inside.exists()
