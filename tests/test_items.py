"""items.py: an LM reads items as vectors of a backbone (E4SRec), or titles and vectors (LLaRA)."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import edit_config, log_of, metrics_of
from safetensors.torch import load_file, save_file
from vector_runs import SMALL, TUNE, ranker_settings, training_targets

import evaluate
import finetune
from delrec.data.others import order_of_others
from delrec.data.prepared import batch_of, candidates, histories, subset, users
from delrec.evaluation.paper import paper_method
from delrec.lm import samples, windows
from delrec.lm.ranker import make_ranker, open_run, score_catalogue, score_samples
from delrec.lm.reading import read_prefix
from delrec.lm.text import ITEM, MASK, embed
from delrec.metrics import metrics
from delrec.runtime import load_run
from delrec.serving.ranking import ranking

CPU = torch.device("cpu")


# ---------------------------------------------------------------- what the LM reads


def test_item_vectors_are_the_backbone_s_directions_and_its_bias(with_items, sasrec):
    E = with_items.items.E
    weights = load_file(sasrec / "model.safetensors")
    e, b = weights["item.weight"][1:], weights["bias"][1:]
    assert E.shape == (61, 17)
    assert not E[0].any()
    torch.testing.assert_close(F.cosine_similarity(E[1:, :16], e), torch.ones(60))
    assert np.corrcoef(E[1:, 16], b)[0, 1] > 0.999
    assert float(E[1:, 16].mean()) == pytest.approx(0, abs=1e-5)
    assert float(E[1:, 16].std()) == pytest.approx(1, abs=0.01)


def test_item_vectors_stand_where_the_titles_stood(with_items, toy):
    m = with_items
    tail, at = make_ranker(m, toy, ranker_settings()).prompts.history(np.array([5, 9, 60]))
    assert tail[at[:3]].tolist() == [ITEM - 5, ITEM - 9, ITEM - 60]
    assert tail[-1] == MASK
    assert len(tail) == 5
    e = embed(m, torch.from_numpy(tail)[None, :-1], None)[0]
    torch.testing.assert_close(e[1:], m.items.maps["in"](m.items.E[[5, 9, 60]]))
    torch.testing.assert_close(e[0], m.model.get_input_embeddings().weight[tail[0]])


def test_a_hybrid_prompt_holds_each_title_and_then_its_vector(with_items, toy):
    both = make_ranker(with_items, toy, ranker_settings(verbalizer="mean", input="hybrid"))
    tail = both.prompts.history(np.array([5, 9]))[0]
    plain = both.plain.history(np.array([5, 9]))[0]
    assert tail[tail > ITEM].tolist() == plain.tolist()
    assert (tail <= ITEM).sum() == 2


def test_hybrid_learns_with_titles_first_and_vectors_later(
    toy, sasrec, decoder, load, run, on_cpu, tmp_path
):
    out = tmp_path / "run"
    run(
        finetune.main,
        f"--dataset {toy.folder} --llm {decoder} --backbone {sasrec} --input hybrid "
        f"--soft-prompt random --verbalizer mean --out {out} {SMALL}",
    )
    settings = load_run(out).settings
    assert (out / "items.safetensors").exists()
    assert settings["input"] == "hybrid"
    r = make_ranker(load("decoder"), toy, settings)
    flags = dict(input="hybrid", C=15, loss="candidates", history=10, seed=0, batch=16)
    rest = dict(order="shuffled", without_fold=None, from_run=None, curriculum="sample")
    rest |= dict(hint="none", orders=1, pool="stored", draw="uniform")
    seen = samples.Histories(SimpleNamespace(**flags, **rest), toy, sasrec, 480)

    def share_with_vectors(first):
        examples = seen.prompts(r, np.arange(first, first + 96))
        return np.mean([(e.tail <= ITEM).any() for e in examples])

    assert abs(share_with_vectors(0) - 0.1) < 0.1
    assert abs(share_with_vectors(192) - 0.5) < 0.15
    assert abs(share_with_vectors(384) - 0.9) < 0.1


# ---------------------------------------------------------------- the loss


def plain_losses(trained, data, llm) -> list:
    """- log softmax over all items of each target in the first 8 windows, by plain transformers."""
    from transformers import AutoModelForCausalLM

    t = load_file(trained.folder / "items.safetensors")
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    r, _ = open_run(trained, data, CPU)
    words = np.append(r.prompts.prefix, r.prompts.history([])[0][0])
    head = model.get_input_embeddings()(torch.from_numpy(words))
    first, last = windows.draw_windows(data, 6, 8, 0)
    losses = []
    for seq, target in zip(*batch_of(data, first, last, 6, training_targets(data))):
        seq, target = seq[seq > 0], target[seq > 0]
        x = torch.cat([head, F.linear(t["E"][seq], t["in.weight"], t["in.bias"])])
        with torch.no_grad():
            states = model.model(inputs_embeds=x[None]).last_hidden_state[0, len(head) :]
        e = F.linear(states[target > 0], t["out.weight"], t["out.bias"])
        log_p = (e @ t["E"][1:].T).log_softmax(1)
        losses += [-row[y - 1].item() for row, y in zip(log_p, target[target > 0])]
    return losses


def test_the_loss_on_item_vectors_is_cross_entropy_over_all_items(
    toy, deep, to_teacher, run, on_cpu, tmp_path
):
    run(finetune.main, f"{to_teacher} --out {tmp_path}/run --lr 1e-9 --lr-maps 1e-9")
    # the first logged loss, before anything moved
    found = log_of(tmp_path / "run")[0]["loss"]
    want = plain_losses(load_run(tmp_path / "run", toy), toy, deep)
    assert found == pytest.approx(np.mean(want), rel=1e-3)


@pytest.mark.parametrize("kind", ["encoder_decoder", "encoder"])
def test_other_lms_read_item_vectors_too(kind, toy, sasrec, request, run, tmp_path):
    llm = request.getfixturevalue(kind)
    result = run(
        finetune.main,
        f"--dataset {toy.folder} --llm {llm} --backbone {sasrec} --input ids "
        f"--out {tmp_path}/run {SMALL}",
    )
    assert np.isfinite(result.json["val_hr@1"])


# ---------------------------------------------------------------- how it ranks


def test_an_lm_on_item_vectors_is_stored_opened_and_scored_alike(teacher, toy, alone, on_cpu):
    trained = load_run(teacher, toy)
    r, penalty = open_run(trained, toy, CPU)
    stored = np.load(teacher / "scores_val_15.npy")
    which = np.flatnonzero(np.isfinite(stored).all(1))[:20]
    again = score_samples(r, "val", which, 15, alone)
    np.testing.assert_allclose(again, stored[which], rtol=1e-4, atol=1e-4)
    assert trained.settings["input"] == "ids"
    assert not penalty.any()
    assert not (teacher / "soft_prompt.safetensors").exists()
    cand = candidates(toy, "val", 15)[which]
    olds = [h[h > 0] for h in histories(toy, toy.val[which], 6)]
    s = ranking(trained, toy, alone)(olds)
    for row, c, own, old in zip(s, cand, stored[which], olds):
        free = ~np.isin(c, old)
        np.testing.assert_allclose(row[c[free]], own[free], rtol=1e-4, atol=1e-4)
        assert (row[old] == -np.inf).all()
        assert np.isfinite(row).sum() == 60 - len(old)


def test_a_step_is_chosen_by_the_whole_catalogue_where_the_lm_ranks_it(teacher, toy, alone, on_cpu):
    r, _ = open_run(load_run(teacher, toy), toy, CPU)
    valid = samples.Validation(SimpleNamespace(C=15, val_samples=12, seed=0, choose="full"), toy)
    scores, found = valid.ask(r, alone)
    np.testing.assert_allclose(scores, score_samples(r, "val", valid.which, 15, alone), atol=1e-4)
    gains, start = [], read_prefix(r.lm, r.prompts.prefix, None)
    for sample in toy.val[valid.which]:
        old = toy.items[toy.ptr[users(toy, np.array([sample]))[0]] : sample]
        s = score_catalogue(r, start, [r.prompts.history(old[-6:])[0]])[0]
        own = s[toy.items[sample]]
        s[old] = -np.inf
        place = 1 + (s > own).sum()
        gains.append(1 / np.log2(place + 1) if place <= 10 else 0)
    assert found["val_full_ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert valid.criterion(found) == found["val_full_ndcg@10"]
    # one that ranks candidates only is chosen by NDCG@10 among them, not by HR@1
    assert valid.criterion({"val_hr@1": 0.9, "val_ndcg@10": 0.5}) == 0.5
    valid.choose = "candidates"
    assert valid.criterion(found) == found["val_ndcg@10"]
    assert "NDCG@10 over all items" in valid.said(found)


def test_the_table_ranks_the_whole_catalogue_by_an_lm_that_reads_it_at_once(
    teacher, sasrec, toy, alone, run, on_cpu, tmp_path
):
    copy = shutil.copytree(teacher, tmp_path / "e4srec")
    run(evaluate.main, f"--ckpt {copy} {sasrec} --limit 30 --out {tmp_path}/out")
    which = subset(len(toy.test), 30, 0)
    full = np.load(copy / "full_test.npy")
    assert (full[np.setdiff1d(np.arange(len(toy.test)), which)] == -1).all()
    r, _ = open_run(load_run(copy, toy), toy, CPU)
    start = read_prefix(r.lm, r.prompts.prefix, None)
    for n in which[:6]:
        sample = toy.test[n]
        old = toy.items[toy.ptr[users(toy, np.array([sample]))[0]] : sample]
        s = score_catalogue(r, start, [r.prompts.history(old[-6:])[0]])[0]
        own = s[toy.items[sample]]
        s[old] = -np.inf
        lists = np.load(copy / "topk_test.npy")[n]
        assert (np.sort(s[lists]) == np.sort(s)[-10:]).all()
        assert full[n, 0] == (s > own).sum()
    stored = np.load(copy / "scores_test_15.npy")[which]
    again = score_samples(r, "test", which, 15, alone)
    np.testing.assert_allclose(stored, again, rtol=1e-4, atol=1e-4)
    assert candidates(toy, "test", 15)[which].shape == stored.shape
    table = metrics_of(tmp_path / "out")
    hits = metrics(*full[which].T, (20,))["hr@20"].mean()
    assert table["full"]["e4srec"]["hr@20"] == pytest.approx(hits)
    assert len(table["full_tests"]) == 1
    shown = np.unique(np.load(copy / "topk_test.npy")[which])
    assert table["beyond"]["rows"]["e4srec"]["coverage"] == pytest.approx(len(shown) / 60)
    assert list(table["full_against"]) == ["e4srec"]
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "paired tests over all items, row minus sasrec" in text


# ---------------------------------------------------------------- what they begin as


@pytest.fixture
def start(toy, decoder, run, on_cpu, tmp_path):
    """start(name, options) -> the maps and the first loss of a stage 2 that moves nothing."""

    def begin(name, options):
        still = "--lr 1e-9 --lr-maps 1e-9 --weight-decay 0"
        where = f"--dataset {toy.folder} --llm {decoder} --out {tmp_path / name}"
        run(finetune.main, f"{where} {TUNE} {still} {options}")
        maps = load_file(tmp_path / name / "items.safetensors")
        return maps, log_of(tmp_path / name)[0]["loss"]

    return begin


def test_stage_2_begins_with_the_maps_that_stage_1_left(
    start, distilled, next_number, toy, tmp_path
):
    given = load_file(distilled / "items.safetensors")
    kept, loss = start("both", f"--soft-prompt {distilled}")
    for name in given:
        torch.testing.assert_close(kept[name], given[name], rtol=0, atol=1e-6)
    kept, other = start("neither", f"--soft-prompt none --backbone {next_number}")
    assert not torch.allclose(kept["out.weight"], given["out.weight"], atol=1e-3)
    assert other != pytest.approx(loss, rel=1e-3)
    # the maps without the prompt
    without = f"--soft-prompt none --backbone {next_number} --maps {distilled}"
    kept, other = start("maps", without)
    torch.testing.assert_close(kept["out.weight"], given["out.weight"], rtol=0, atol=1e-6)
    assert not (tmp_path / "maps" / "soft_prompt.safetensors").exists()
    assert other != pytest.approx(loss, rel=1e-3)
    runs = [load_run(tmp_path / name, toy) for name in ("both", "neither", "maps")]
    assert [paper_method(each) for each in runs] == ["w/o TA", "w/o SP", None]


def test_permuted_vectors_are_read_by_the_maps_that_stage_1_left(
    start, distilled, next_number, tmp_path
):
    given = load_file(distilled / "items.safetensors")
    kept, _ = start("control", f"--soft-prompt {distilled} --permute-vectors")
    order = order_of_others(60)
    assert torch.equal(kept["E"], given["E"][order]) and not torch.equal(kept["E"], given["E"])
    maps = set(given) - {"E"}
    for name in maps:
        torch.testing.assert_close(kept[name], given[name], rtol=0, atol=1e-6)
    # and by those of the control itself
    begun = f"--soft-prompt none --backbone {next_number} --maps {tmp_path}/control"
    again, _ = start("again", f"{begun} --permute-vectors")
    assert torch.equal(again["E"], kept["E"])
    for name in maps:
        torch.testing.assert_close(again[name], kept[name], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- refusals


@pytest.fixture
def stage_2(toy, decoder, refused, on_cpu, tmp_path):
    """stage_2(options) -> how finetune.py refuses them; nothing is written."""

    def says(options):
        where = f"--dataset {toy.folder} --llm {decoder} --out {tmp_path}/f"
        sentence = refused(finetune.main, f"{where} {options}")
        assert not (tmp_path / "f").exists()
        return sentence

    return says


def test_vectors_with_options_about_titles_are_refused(stage_2, next_number, distilled):
    few = "--samples 48 --batch 8"
    says = stage_2(f"--soft-prompt {distilled} {few}")
    assert "was distilled on item vectors, --input is titles" in says
    says = stage_2(f"--soft-prompt none --backbone {next_number} --maps {distilled} {few}")
    assert "--maps begins the maps of item vectors, but --input is titles" in says
    says = stage_2(f"{TUNE} --soft-prompt {distilled} --loss titles")
    assert "--loss is about titles" in says
    says = stage_2(f"{SMALL} --input hybrid --loss both")
    assert "--input hybrid" in says


def test_maps_of_another_backbone_are_refused(stage_2, next_number, distilled, tmp_path):
    other = shutil.copytree(next_number, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"bias": weights["bias"] + torch.arange(61)}, other / "model.safetensors")
    says = stage_2(f"{TUNE} --soft-prompt none --maps {distilled} --backbone {other}")
    assert "the item vectors of another backbone" in says
    says = stage_2(f"{TUNE} --soft-prompt {distilled} --backbone {other}")
    assert f"was distilled from {next_number}, --backbone is {other}" in says
    says = stage_2(f"{TUNE} --maps {distilled} --teacher {distilled}")
    assert "--maps and --teacher both say" in says


def test_maps_of_permuted_vectors_begin_no_run_on_the_items_own(
    stage_2, next_number, distilled, tmp_path
):
    control = shutil.copytree(distilled, tmp_path / "control")
    tensors = load_file(control / "items.safetensors")
    permuted = tensors["E"][order_of_others(60)]
    save_file(tensors | {"E": permuted}, control / "items.safetensors")
    says = stage_2(f"{TUNE} --soft-prompt none --backbone {next_number} --maps {control}")
    assert f"{control} was trained with --permute-vectors" in says


def test_a_backbone_of_another_preparation_is_refused(stage_2, next_number, tmp_path):
    other = shutil.copytree(next_number, tmp_path / "other")
    edit_config(other, data_hash="0123456789abcdef")
    # what it has seen is not known
    says = stage_2(f"{TUNE} --soft-prompt none --backbone {other}")
    assert "another preparation" in says


def test_a_broken_file_of_item_vectors_is_a_sentence(teacher, refused, on_cpu, tmp_path):
    broken = shutil.copytree(teacher, tmp_path / "broken")
    save_file({"E": torch.zeros(3, 17)}, broken / "items.safetensors")
    assert "items.safetensors" in refused(evaluate.main, f"--ckpt {broken}")
