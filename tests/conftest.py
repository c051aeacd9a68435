"""What the tests share: three tiny LMs as Hugging Face folders, a prepared toy data set, backbones
made by a rule, and how to run a script.

The tests import the scripts from the repository's root. Nothing here is trained: the LMs are
random, with weights large enough that what they read changes what they say.
"""

import contextlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    # read when a Triton kernel is defined: the kernels run here, slowly, on the CPU
    os.environ["TRITON_INTERPRET"] = "1"


# tests/all is long: it runs when it is named
collect_ignore = ["all"]


def pytest_configure(config):
    # the tensors here are tiny: on a busy machine more threads wait for each other
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def findings(tmp_path_factory):
    """What is measured of an LM at load is kept in a folder of the tests', not in the user's
    cache.
    """
    from delrec.lm import check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


# ---------------------------------------------------------------- pictures

DRAWN = []  # not empty: pictures are drawn


@contextlib.contextmanager
def drawing():
    """With it figures are drawn. Elsewhere they are built, and an empty file is written: nobody
    looks at most of them, and to draw them takes longer than the rest of evaluate.py."""
    DRAWN.append(True)
    try:
        yield
    finally:
        DRAWN.pop()


@pytest.fixture(scope="session", autouse=True)
def drawn_where_looked_at():
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def savefig(self, file, **how):
        if DRAWN:
            draw(self, file, **how)
        elif not hasattr(file, "write"):
            Path(file).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


# ---------------------------------------------------------------- running the scripts


@pytest.fixture(scope="session")
def fp32():
    """with fp32(): fp32 on the CPU, whatever the machine has, so that sums can be compared closely,
    and with two processes.
    """
    from delrec.lm import model

    @contextlib.contextmanager
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(model, "has_fast_bf16", lambda: False)
            yield

    return patched


@pytest.fixture
def on_cpu(fp32):
    with fp32():
        yield


@pytest.fixture(scope="session")
def script():
    """script(main, args...) runs a script in this process; returns click's result with .json, the
    object of its last line.
    """

    def run(main, *args, code=0):
        result = CliRunner().invoke(main, [str(a) for a in args])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        last = result.stdout.strip().split("\n")[-1]
        result.json = json.loads(last) if last.startswith("{") else None
        result.error = result.stderr[result.stderr.find("Error: ") :].strip() if code else ""
        # one sentence, no stack trace
        assert not code or (result.error and "\n" not in result.error), result.output
        return result

    return run


TWO = """import json, sys
import torch.distributed as dist
from delrec.lm import model
import distill, evaluate, finetune, train_backbone
model.has_fast_bf16 = lambda: False
{before}
for name, args, last in json.loads({jobs!r}):
    script = sys.modules[name]
    if not last:                                         # one process group for all of them
        script.finish = lambda ranks: dist.barrier()
    script.main(args, standalone_mode=False)
"""


@pytest.fixture(scope="session")
def fork():
    """fork(code, env, n): n new processes that run some Python, without starting Python."""
    from forked import Mother

    with Mother(ROOT) as mother:
        yield mother.fork


@pytest.fixture(scope="session")
def two_processes(fork):
    """two_processes([(script's name, args), ...]): one after another by two gloo processes (or n)
    such as torchrun makes, fp32 on the CPU; before: lines of Python that each process runs first.
    Returns what the first prints. torchrun itself is used by other tests."""

    def run(jobs, n=2, before=""):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        told = [
            (name, [str(a) for a in args], job == len(jobs) - 1)
            for job, (name, args) in enumerate(jobs)
        ]
        code = TWO.format(jobs=json.dumps(told), before=before)
        who = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n)} for r in range(n)]
        processes = [fork(code, meet | w) for w in who]
        said = [p.communicate(timeout=300)[0] for p in processes]
        assert not any(p.returncode for p in processes), "\n".join(said)
        return said[0]

    return run


# ---------------------------------------------------------------- a toy data set

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
    (raw / "interactions.csv").write_text(
        "user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows)
    )

    def quoted(t):
        return '"' + t.replace('"', '""') + '"'

    (raw / "items.csv").write_text(
        "item,title\n" + "".join(f"{i},{quoted(t)}\n" for i, t in titles.items()), encoding="utf-8"
    )
    result = CliRunner().invoke(
        prepare.main,
        [
            name,
            "--raw",
            str(raw),
            "--out",
            str(folder / name),
            "--core",
            "1",
            "--noun",
            "movie",
            "--verb",
            "watched",
            *args,
        ],
    )
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


# ---------------------------------------------------------------- three kinds of LM


def corpus():
    """What the tokenizers are trained on: the titles and the words of the prompts."""
    return [title_of(n) for n in range(60)] * 4 + [
        "Movies the user watched, oldest first:",
        "Candidate movies:",
        "The next movie:",
        "The next movie was:",
        "Later movies:",
        "So the most recent movie was:",
        "How SASRec recommends movies:",
        "SASRec's choices after its first:",
        "SASRec's first choice:",
        "A. B. C. D. E. F. G. H. I. J. K. L. M. N. O. P. Q. R. S. T. U. V. W. X. Y. Z.",
    ] * 8


def bpe_tokenizer():
    """Byte-level BPE in the way of SmolLM2, with a token that begins every text (as Llama's)."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def unigram_tokenizer():
    """Unigram over Metaspace with sentinels and a closing </s>, in the way of T5. The pieces are
    given, not trained: training is not the same twice.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(10))]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;'()▁"
    words = sorted(
        {f"▁{w}" for w in " ".join(corpus()).split() if w.isalpha()}
        | {f"▁{c}" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    )
    tok = Tokenizer(
        models.Unigram(
            [(t, 0.0) for t in special]
            + [(c, -12.0) for c in letters]
            + [(w, -6.0) for w in words],
            unk_id=2,
        )
    )
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
    )


def wordpiece_tokenizer():
    """Lower-cased WordPiece between [CLS] and [SEP], in the way of BERT."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;'()"
    words = sorted(
        {w for w in " ".join(corpus()).lower().split() if w.isalpha() and len(w) > 1}
        - {"carnival", "mountain"}
    )
    vocab = {
        t: i
        for i, t in enumerate(
            [*special, *letters, *(f"##{c}" for c in letters), *words, "##ni", "moun"]
        )
    }
    tok = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer, tok.decoder = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def randomise(model, seed, gain=1.5):
    """Weights large enough that every part of the prompt moves the scores; a tied head stays
    tied.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(
                    torch.randn(p.shape, generator=generator)
                    * (0.7 if "embed" in name or "shared" in name else gain * p.shape[1] ** -0.5)
                )
            elif "bias" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.eval()


def save(folder, model, tok):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """The folder of a two-layer Llama, width 32, tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = bpe_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=3,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )
    return save(tmp_path_factory.mktemp("lms") / "tiny-llama", randomise(model, 1), tok)


def t5(folder):
    from transformers import T5Config, T5ForConditionalGeneration

    tok = unigram_tokenizer()
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tok),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    return save(folder, randomise(model, 2), tok)


@pytest.fixture(scope="session")
def encoder_decoder(tmp_path_factory):
    """The folder of a two-layer T5, width 32, tied head (and so scaled outputs), as transformers
    makes it.
    """
    return t5(tmp_path_factory.mktemp("lms") / "tiny-t5")


@pytest.fixture(scope="session")
def flan(tmp_path_factory):
    """The same T5 with a head of its own in the file and tie_word_embeddings false, as Flan-T5
    ships.
    """
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("lms") / "tiny-flan"
    t5(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = (
        torch.randn(weights["shared.weight"].shape, generator=torch.Generator().manual_seed(3))
        * 0.3
    )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a two-layer BERT, width 32, tied head with a bias."""
    from transformers import BertConfig, BertForMaskedLM

    tok = wordpiece_tokenizer()
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tok),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=512,
        )
    )
    return save(tmp_path_factory.mktemp("lms") / "tiny-bert", randomise(model, 4), tok)


KINDS = ["decoder", "encoder_decoder", "flan", "encoder"]


@pytest.fixture(scope="session")
def load(request):
    """load(kind) -> the LM of load_lm in fp32 on the CPU, loaded once a session.

    Nobody may change it.
    """
    from delrec.lm.model import load_lm

    loaded = {}

    def get(kind):
        if kind not in loaded:
            loaded[kind] = load_lm(
                request.getfixturevalue(kind), torch.device("cpu"), torch.float32
            )
        return loaded[kind]

    return get


@pytest.fixture
def alone():
    """The ranks of a single process."""
    return SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), main=True)


# ---------------------------------------------------------------- the three stages on all of it


def stages(data, backbone, llm, prompt, out):
    """Arguments of distill.py and finetune.py, every one that matters: they write `prompt` and
    `out`.
    """
    common = [
        "--dataset",
        data.folder,
        "--llm",
        llm,
        "--verbalizer",
        "likelihood",
        "--no-show",
        "--history",
        6,
        "--max-title",
        32,
        "--max-tokens",
        1024,
        "--batch",
        8,
        "--micro",
        4,
        "--seed",
        0,
        "--evals",
        2,
    ]
    return (
        [
            "--backbone",
            backbone,
            "--out",
            prompt,
            *common,
            "--k",
            6,
            "--tasks",
            "both",
            "--a",
            3,
            "--h",
            5,
            "--candidates",
            8,
            "--balance",
            "gradnorm",
            "--samples",
            48,
            "--lr",
            0.05,
            "--weight-decay",
            1e-5,
            "--warmup",
            0.1,
            "--val-samples",
            20,
        ],
        [
            "--soft-prompt",
            prompt,
            "--out",
            out,
            *common,
            "--order",
            "shuffled",
            "--adapt",
            "qv",
            "--init-r",
            6,
            "--target-r",
            3,
            "--alpha",
            32,
            "--dropout",
            0,
            "--orthogonal",
            0.1,
            "--loss",
            "both",
            "--candidates",
            15,
            "--samples",
            80,
            "--lr",
            0.03,
            "--weight-decay",
            1e-6,
            "--warmup",
            0.1,
            "--val-samples",
            30,
            "--calibrate",
        ],
    )


@pytest.fixture(scope="session")
def chain(toy, backbone, decoder, script, fp32, tmp_path_factory):
    """distill.py and finetune.py run once on the toy data by one process: their folders and click's
    results. Nobody may write there.
    """
    import distill
    import finetune

    folder = tmp_path_factory.mktemp("chain")
    to_prompt, to_delrec = stages(toy, backbone, decoder, folder / "prompt", folder / "delrec")
    with fp32():
        return SimpleNamespace(
            prompt=folder / "prompt",
            delrec=folder / "delrec",
            distilled=script(distill.main, *to_prompt),
            tuned=script(finetune.main, *to_delrec),
        )


@pytest.fixture(scope="session")
def twins(chain, toy, backbone, decoder, two_processes, tmp_path_factory):
    """The same by two processes: .prompt, .delrec (from the one process's prompt), and .evaluated,
    a copy of the one process's delrec whose test part two processes scored.
    """
    folder = tmp_path_factory.mktemp("twins")
    to_prompt, _ = stages(toy, backbone, decoder, folder / "prompt", "")
    _, to_delrec = stages(toy, backbone, decoder, chain.prompt, folder / "delrec")
    copy = shutil.copytree(chain.delrec, folder / "evaluated")
    for path in copy.glob("*_test_*"):
        path.unlink()
    printed = two_processes(
        [("distill", to_prompt), ("finetune", to_delrec), ("evaluate", evaluation(copy))]
    )
    return SimpleNamespace(
        prompt=folder / "prompt", delrec=folder / "delrec", evaluated=copy, printed=printed
    )


def evaluation(run):
    return ["--ckpt", run, "--candidates", 15, "--val-samples", 30, "--limit", 40]
