"""Runs whose LM reads items as vectors: an E4SRec, the SLMRec student it taught, a prompt that was
distilled into them.
"""

import shutil

import numpy as np
import pytest
import torch

from delrec.lm import items

SMALL = (
    "--k 4 --batch 8 --micro 4 --samples 48 --evals 1 --val-samples 20 --init-r 4 --target-r 2 "
    "--dropout 0"
)
# stage 1 and stage 2 on vectors
DISTIL = (
    "--input ids --history 6 --a 3 --h 3 --candidates 10 --k 4 --batch 8 --micro 4 "
    "--val-samples 20 --seed 0"
)
TUNE = f"--input ids --history 6 {SMALL}"


def training_targets(data) -> np.ndarray:
    """Which places of data.items are training targets."""
    is_target = np.zeros(len(data.items), bool)
    is_target[data.train] = True
    return is_target


def ranker_settings(**changes) -> dict:
    """Settings of make_ranker, for an LM that reads vectors unless changed."""
    texts = {"max_title": 32, "max_tokens": 1000, "backbone": "SASRec", "backbone_run": ""}
    reads = {"verbalizer": "items", "show": False, "order": "shuffled", "input": "ids"}
    return texts | reads | {"history": 6} | changes


@pytest.fixture
def with_items(load, sasrec):
    """The tiny decoder with SASRec's item vectors."""
    lm = load("decoder")
    try:
        items.load_items(lm, sasrec, 60)
        yield lm
    finally:
        lm.items = None


# ---------------------------------------------------------------- a teacher and its student


@pytest.fixture(scope="session")
def deep(tmp_path_factory, decoder):
    """A decoder of 4 layers with the tiny decoder's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(decoder)
    config.num_hidden_layers, config.layer_types = 4, None
    folder = tmp_path_factory.mktemp("deep") / "deep"
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def to_teacher(toy, deep, sasrec):
    """finetune.py's options that train the deep LM on item vectors."""
    return f"--dataset {toy.folder} --llm {deep} --backbone {sasrec} {TUNE}"


@pytest.fixture(scope="session")
def teacher(to_teacher, run, fp32, tmp_path_factory):
    """The run of an E4SRec of 4 layers."""
    import finetune

    folder = tmp_path_factory.mktemp("teacher") / "e4srec"
    with fp32():
        run(finetune.main, f"{to_teacher} --out {folder}")
    return folder


@pytest.fixture(scope="session")
def to_student(toy, deep, teacher):
    """finetune.py's options that teach the first two layers of the deep LM."""
    return f"--dataset {toy.folder} --llm {deep} --teacher {teacher} --layers 2 --blocks 2 {SMALL}"


@pytest.fixture(scope="session")
def student(to_student, run, fp32, tmp_path_factory):
    """The run of an SLMRec of 2 layers, with its export."""
    import evaluate
    import finetune

    folder = tmp_path_factory.mktemp("student") / "slmrec"
    with fp32():
        run(finetune.main, f"{to_student} --out {folder}")
        run(evaluate.main, f"--ckpt {folder} --export --export-k 5")
    return folder


# ---------------------------------------------------------------- a backbone and its prompt


@pytest.fixture(scope="session")
def next_number(toy, sasrec, make_backbone, tmp_path_factory):
    """A backbone with SASRec's vectors whose list begins with the next number after the last item:
    a rule that is in no title and no sequence.
    """

    def score(samples):
        last = toy.items[np.asarray(samples) - 1].astype(int)
        return -((np.arange(toy.n_items + 1)[None] - last[:, None] - 1) % toy.n_items).astype(float)

    folder = make_backbone(tmp_path_factory.mktemp("planted") / "rule", toy, score)
    shutil.copy(sasrec / "model.safetensors", folder)
    return folder


@pytest.fixture(scope="session")
def to_vectors(toy, next_number, decoder):
    """distill.py's options that distil next_number into a soft prompt and maps."""
    return f"--dataset {toy.folder} --backbone {next_number} --llm {decoder} {DISTIL}"


@pytest.fixture(scope="session")
def distilled(to_vectors, run, fp32, tmp_path_factory):
    """The run of a prompt that has learnt next_number's lists."""
    import distill

    folder = tmp_path_factory.mktemp("distilled") / "prompt"
    learning = "--tasks rps --samples 1600 --lr 0.02 --lr-maps 0.01 --evals 3"
    with fp32():
        run(distill.main, f"{to_vectors} --out {folder} {learning}")
    return folder
