"""dllm2rec.py: a conventional model learns from an LM's export (DLLM2Rec)."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import edit_config
from safetensors.torch import load_file
from stopped_runs import stopped

import train_backbone
from delrec.backbone import dllm2rec, models, text
from delrec.data.prepared import candidates, histories
from delrec.data.words import tfidf

SHORT = "--epochs 2 --width 16"


@pytest.fixture
def train(toy, run, on_cpu, tmp_path):
    """train(name, options) -> the folder of a short training on the toy data."""

    def short(name, options=""):
        out = tmp_path / name
        run(train_backbone.main, f"--dataset {toy.folder} --out {out} {SHORT} {options}")
        return out

    return short


def weights_of(folder) -> dict:
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------- what the student becomes


@pytest.mark.parametrize("model", models.MODELS)
def test_by_titles_that_weigh_nothing_the_student_is_the_plain_backbone_bit_for_bit(
    model, student, train
):
    plain = train("plain", f"--model {model}")
    taught = train("taught", f"--model {model} --teacher {student} --eta 1e-300")  # 0 in float32
    really = train("really", f"--model {model} --teacher {student}")
    a, b, c = (weights_of(folder) for folder in (plain, taught, really))
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["item.weight"], c["item.weight"])
    scores = [np.load(folder / "scores_test_15.npy") for folder in (plain, taught)]
    assert np.array_equal(*scores)


def test_the_titles_are_folded_into_plain_item_vectors(toy, student, train):
    out = train("run", f"--teacher {student} --eta 0.5 --lam 0")
    model = models.load(out)
    assert not model.item.weight[0].any()
    plain = models.build("sasrec", 60, SimpleNamespace(history=20, width=16, dropout=0))
    assert weights_of(out).keys() == plain.state_dict().keys()
    with torch.no_grad():
        s = models.score(model, torch.as_tensor(histories(toy, toy.test, 20)))
    got = s.gather(1, torch.as_tensor(candidates(toy, "test", 15)))
    np.testing.assert_allclose(got, np.load(out / "scores_test_15.npy"), rtol=1e-4, atol=1e-4)


def test_without_the_offset_an_item_vector_is_a_linear_map_of_its_title_s(student, train):
    out = train("bare", f"--teacher {student} --eta 0.5 --no-offset")
    Z = np.load(student / "export" / "titles.npy")[1:]
    e = weights_of(out)["item.weight"][1:].numpy()
    A = np.c_[Z, np.ones(len(Z))]
    # of rank at most that of W
    rest = A @ np.linalg.lstsq(A, e, rcond=None)[0] - e
    assert np.abs(rest).max() < 1e-3 * np.abs(e).max() + 1e-4


def test_bags_of_words_are_a_teacher_without_an_lm(toy, train, refused):
    Z = text.tfidf_vectors(toy)
    id_IT, weight_IT, V = tfidf(toy.titles)
    dense = np.zeros((61, V), np.float32)
    np.add.at(dense, (np.arange(61)[:, None], id_IT), weight_IT)
    # all directions are kept here: the cosines are those of the words
    np.testing.assert_allclose(Z @ Z.T, dense @ dense.T, atol=1e-4)
    taught = weights_of(train("words", "--teacher tfidf"))["item.weight"]
    plain = weights_of(train("plain"))["item.weight"]
    assert taught.shape == plain.shape
    assert (taught - plain).abs().max() > 0.01
    assert not taught[0].any()
    says = refused(train_backbone.main, f"--dataset {toy.folder} --teacher tfidf --lam 0.5")
    assert "has titles' vectors but no lists" in says


def test_two_processes_learn_from_a_teacher_as_one(toy, student, train, two_processes, tmp_path):
    options = f"--dropout 0 --teacher {student} --lam 0.5"
    one = train("one", options)
    two = f"--dataset {toy.folder} --out {tmp_path}/two {SHORT} {options}"
    two_processes([("train_backbone", two.split())])
    a, b = weights_of(one), weights_of(tmp_path / "two")
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)


def test_a_killed_student_does_not_go_on_with_other_lists(
    toy, student, run, on_cpu, tmp_path, monkeypatch
):
    teacher = shutil.copytree(student, tmp_path / "teacher")
    options = f"--teacher {teacher} --lam .5 --eta 0 --checkpoint-every 1"
    typed = f"--dataset {toy.folder} {SHORT} {options}".split()

    def args(out, *more):
        return [*typed, "--out", str(out), *map(str, more)]

    jobs = {"student": (train_backbone.main, args)}
    assert stopped(jobs, "student", tmp_path / "cut", monkeypatch, 1)
    truth = np.load(teacher / "export" / "truth.npy")
    np.save(teacher / "export" / "truth.npy", truth / 2)
    said = run(train_backbone.main, " ".join(args(tmp_path / "cut", "--resume")), code=1).error
    assert "cannot resume" in said and "what the teacher's export says was" in said


# ---------------------------------------------------------------- what the lists weigh


@pytest.fixture
def export_with(student, toy):
    """export_with(options..) -> the student's export, weighted so."""

    def read(**options):
        usual = {"confidence": "truth", "w_position": 0.3, "w_confidence": 0.5, "temperature": 1.0}
        return dllm2rec.read_export(student, toy, SimpleNamespace(**usual | {"seed": 0} | options))

    return read


def test_weights_follow_place(export_with):
    place = export_with(w_confidence=0).weight
    falling = np.exp(-np.arange(1, 6))
    assert np.allclose(place, 0.3 * falling / falling.sum(), rtol=1e-5)


def test_a_list_counts_as_much_as_its_teacher_knows_the_truth(export_with, student):
    found = export_with()
    truth = np.load(student / "export" / "truth.npy")
    # one number a sample, higher where the teacher is right, 1 on average
    assert (np.diff(found.trust[np.argsort(truth)]) >= -1e-7).all()
    assert np.ptp(found.trust) > 0
    assert found.trust.mean() == pytest.approx(1, abs=1e-5)
    # within a list it says nothing
    assert np.allclose(found.weight, export_with(w_confidence=0).weight)
    assert np.allclose(export_with(w_confidence=0).trust, 1)
    # the control has the same numbers at other samples
    other = export_with(confidence="permuted").trust
    assert np.allclose(np.sort(other), np.sort(found.trust))
    assert not np.allclose(other, found.trust)


def test_trust_by_hand():
    truth, asked = np.array([1.0, 0.0, 0.7]), np.array([True, True, False])
    cfg = SimpleNamespace(confidence="truth", w_confidence=0.5, temperature=1.0, seed=0)
    # c = 1 and e^-1, their mean .6839: m = 1 + .5 (1 / .6839 - 1), 1 + .5 (.3679 / .6839 - 1)
    found = dllm2rec.trust_in(truth, asked, cfg)[:2]
    assert found == pytest.approx([1.2311, 0.7689], abs=1e-4)
    # nearer to 0, the more a mistake costs: c = 1 and e^(-1 / .3) = .0357
    cfg.temperature = 0.3
    found = dllm2rec.trust_in(truth, asked, cfg)[:2]
    assert found == pytest.approx([1.4656, 0.5344], abs=1e-4)


def test_confidence_in_the_listed_items_is_the_released_code_s(student, toy, tmp_path):
    copy = shutil.copytree(student, tmp_path / "copy")
    n = len(toy.train)
    np.save(copy / "export" / "listed.npy", np.tile(np.float32([0.8, 0.2, 0.2, 0.2, 0.2]), (n, 1)))
    cfg = SimpleNamespace(confidence="listed", w_position=0.3, w_confidence=0.5, temperature=1.0)
    found = dllm2rec.read_export(str(copy), toy, cfg)
    # w_p = e^-r over its sum; w_c = e^-.2, e^-.8, .. over theirs: .3130 and .1717 four times
    place = np.exp(-np.arange(1, 6)) / np.exp(-np.arange(1, 6)).sum()
    want = 0.3 * place + 0.5 * np.array([0.3130, 0.1717, 0.1717, 0.1717, 0.1717])
    assert np.allclose(found.weight, want, atol=1e-4)
    # every list counts the same
    assert np.allclose(found.trust, 1)


def test_the_lists_term_is_a_mean_over_the_lists_times_the_number_of_targets(alone):
    data = SimpleNamespace(items=np.arange(1, 9), train=np.array([1, 2, 3, 5, 6, 7]))
    topk = np.array([[5, 8], [0, 0], [3, 1], [0, 0], [2, 7], [0, 0]], np.int32)
    alike, ones = np.ones((6, 2), np.float32), np.ones(6, np.float32)
    cfg = SimpleNamespace(lam=0.5, w_consistency=0, list_loss="softmax")
    taught = dllm2rec.Teacher(cfg, data, dllm2rec.Given(topk=topk, weight=alike, trust=ones))
    torch.manual_seed(0)
    sizes = SimpleNamespace(history=3, width=4, dropout=0, fp32=True)
    model = models.build("sasrec", 8, sizes)
    x_NE, target_BL = torch.randn(6, 4), np.array([[2, 3, 4], [6, 7, 8]])
    at_N = torch.from_numpy(target_BL).nonzero(as_tuple=True)
    found = taught.term(np.array([3, 7]), target_BL, target_BL, alone)(model, x_NE, at_N, 3)
    log_p = (x_NE @ model.item.weight.T)[:, 1:].log_softmax(1)
    lists = {n: row for n, row in enumerate(topk - 1) if row[0] >= 0}
    want = -sum(log_p[n, row].mean() for n, row in lists.items())
    torch.testing.assert_close(found, 0.5 * 6 / 3 * want)


# ---------------------------------------------------------------- planted knowledge


def item_numbers(data) -> np.ndarray:
    """The number of each item in its title (I,), from item 1 on."""
    return np.array([int(t.split()[1]) for t in data.titles[1:]])


def steps_from(data, factor) -> np.ndarray:
    """The item `factor` times the last one, mod 61, of every training sample (n,)."""
    number = item_numbers(data)
    item_of = {n: i for i, n in enumerate(number, 1)}
    last = histories(data, data.train, 1)[:, 0]
    return np.array([item_of[factor * number[i - 1] % 61] for i in last])


def noisy_walks(rng) -> list:
    """Rows of 90 users whose next item is 7 i mod 61 three times in ten and anything else
    otherwise."""
    rows = []
    for u in range(90):
        i = int(rng.integers(1, 61))
        for t in range(14):
            rows.append((u, i, 20 * t + u % 20))
            i = 7 * i % 61 if rng.random() < 0.3 else int(rng.integers(1, 61))
    return rows


@pytest.fixture(scope="module")
def noisy(make_data, student, tmp_path_factory):
    """(data of noisy walks, a run folder whose export always lists 7 i mod 61 first): what the
    teacher knows stands in its lists only.
    """
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("noisy")
    titles = {i: f"film {i}" for i in range(1, 61)}
    data = make_data(folder, noisy_walks(rng), titles, "noisy")
    wise = shutil.copytree(student, folder / "wise")
    made_of = {"data_folder": str(data.folder), "data_hash": data.meta["hash"]}
    edit_config(wise, dataset="noisy", **made_of)
    knows = steps_from(data, 7)
    topk = np.stack([knows, *(rng.integers(1, 61, (4, len(knows))))], 1)
    np.save(wise / "export" / "topk.npy", topk.astype(np.int32))
    np.save(wise / "export" / "truth.npy", rng.random(len(knows)).astype(np.float32))
    listed = np.tile(np.float32([0.8, 0.05, 0.05, 0.05, 0.05]), (len(knows), 1))
    np.save(wise / "export" / "listed.npy", listed)
    return data, wise


@pytest.mark.parametrize(
    "loss, list_options",
    [
        ("", ""),
        ("", "--confidence listed --w-consistency 0"),
        ("", "--list-loss sigmoid"),
        ("--loss bce", ""),
        ("--loss sampled --negatives 20", ""),
    ],
)
def test_a_teacher_who_knows_more_than_the_targets_makes_a_better_student(
    loss, list_options, noisy, run, on_cpu, tmp_path
):
    data, wise = noisy
    train = "--width 32 --epochs 12 --dropout 0.1 --lr 3e-3 --batch 16"
    base = f"--dataset {data.folder} {train} {loss}"
    plain = run(train_backbone.main, f"{base} --out {tmp_path}/plain").json
    lists = f"--teacher {wise} --lam 1 --eta 0 {list_options}"
    taught = run(train_backbone.main, f"{base} --out {tmp_path}/taught {lists}").json
    assert taught["val_full_ndcg@10"] > 1.04 * plain["val_full_ndcg@10"]


def is_lied_to(data) -> np.ndarray:
    """True for the training samples whose last item has an even number (n,)."""
    return item_numbers(data)[histories(data, data.train, 1)[:, 0] - 1] % 2 == 0


@pytest.fixture(scope="module")
def half_wrong(noisy, tmp_path_factory):
    """(data, a copy of the wise teacher that is wrong after every second item, where it lists
    another rule's, and does not think much of the truth).
    """
    data, wise = noisy
    liar = shutil.copytree(wise, tmp_path_factory.mktemp("liar") / "liar")
    wrong = is_lied_to(data)
    topk = np.load(wise / "export" / "topk.npy")
    topk[wrong, 0] = steps_from(data, 11)[wrong]
    np.save(liar / "export" / "topk.npy", topk)
    np.save(liar / "export" / "truth.npy", np.where(wrong, 0.02, 0.8).astype(np.float32))
    return data, liar


def test_a_teacher_that_is_wrong_half_of_the_time_hurts_less_with_confidence(
    half_wrong, run, on_cpu, tmp_path
):
    data, liar = half_wrong
    train = "--width 32 --epochs 16 --dropout 0.1 --lr 3e-3 --batch 16"
    base = f"--dataset {data.folder} {train} --teacher {liar} --lam 0.7 --eta 0"
    after_test = replace(data, train=data.test)
    right, wrong = (steps_from(after_test, factor) for factor in (7, 11))
    lied_to = is_lied_to(after_test)

    def misled(name, options):
        """How often the teacher's mistake stands above what the sequences say."""
        run(train_backbone.main, f"{base} --out {tmp_path}/{name} {options}")
        first = np.load(tmp_path / name / "topk_test.npy")[:, 0]
        assert (first == right)[~lied_to].mean() > 0.6
        return float((first == wrong)[lied_to].mean())

    without = misled("without", "--w-confidence 0")
    assert without > 0.5
    assert misled("with", "") < without - 0.15
    assert misled("all", "--w-confidence 1") < without - 0.4
    # confidence that belongs to other samples, or stays within the list, does not help
    assert misled("permuted", "--confidence permuted") > without - 0.1
    assert misled("listed", "--confidence listed") > without - 0.1


# ---------------------------------------------------------------- refusals


def test_teachers_that_do_not_fit_are_sentences(
    toy, teacher, student, make_data, refused, on_cpu, tmp_path
):
    def says(options):
        return refused(train_backbone.main, f"--dataset {toy.folder} {options}")

    rows = [(u, 1 + (u + i) % 60, u * 20 + i) for u in range(60) for i in range(12)]
    other = make_data(tmp_path, rows, {i: f"film {i}" for i in range(1, 61)}, "other")
    assert "another preparation" in says(f"--dataset {other.folder} --teacher {student}")
    assert "no export" in says(f"--teacher {teacher}")
    assert "--no-offset" in says("--no-offset")
    assert "at most 1" in says(f"--teacher {student} --lam 1 --w-confidence 1.5")
    late = edit_config(shutil.copytree(student, tmp_path / "late"), seconds=-1)
    assert "earlier training" in says(f"--teacher {late}")
