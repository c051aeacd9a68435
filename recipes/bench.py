"""The LM's part of the work, ours against what one would write with transformers alone.

    python recipes/bench.py            make bench-llm; about fifteen minutes on 2 cores
    python recipes/bench.py --quick    ratios only, without the curves

The other way: strings tokenised per batch, padded, all positions through the head
(model(...).logits), gather; the same LM, dtype, prompts and machine, in one run. On a GPU it also
times random LMs of Flan-T5-XL's and of an 8 B Llama's shape at prompts of 600 tokens. The last line
is one JSON object.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch
import torch.nn.functional as F

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import finetune
from delrec.data.prepared import candidates, histories, load_data
from delrec.kernels.bench import report, times
from delrec.lm import check, reading
from delrec.lm.layers import adapt_modules, checkpoint_layers
from delrec.lm.model import LM, load_lm
from delrec.lm.ranker import make_ranker, score_tails
from delrec.lm.reading import read_prefix
from delrec.lm.text import MASK, SLOT, random_soft_prompt
from delrec.lm.titles import Titles
from delrec.lm.verbalizers import score
from delrec.training.memory import extra_bytes

K, C = 80, 15
# per request, DELRec's figure 9, ten RTX 3090 together
PAPER_SECONDS = 0.182


# ---------------------------------------------------------------- the rival


class Rival:
    """The plain way: one string per prompt (and, for likelihood, per prompt and candidate), P
    spliced in at a placeholder token.
    """

    def __init__(self, lm, data, P):
        self.tok, self.data, self.P, self.slot = lm.tok, data, P, lm.tok.convert_ids_to_tokens(3)
        self.tok.padding_side, self.tok.pad_token = "left", self.tok.pad_token or self.tok.eos_token
        from transformers import AutoModelForCausalLM

        self.model = (
            AutoModelForCausalLM.from_pretrained(lm.folder, dtype=lm.dtype, trust_remote_code=False)
            .to(lm.device)
            .eval()
            .requires_grad_(False)
        )

    def prompt(self, old, cand):
        noun, verb, titles = (
            *[self.data.meta["words"][w] for w in ("noun", "verb")],
            self.data.titles,
        )
        return (
            f"How SASRec recommends {noun}s:{self.slot * K}\n{noun.capitalize()}s the user {verb}, "
            "oldest first:\n"
            + "".join(titles[i] + "\n" for i in old)
            + f"Candidate {noun}s:\n"
            + "".join(titles[i] + "\n" for i in cand)
            + f"The next {noun}:\n"
        )

    def logits(self, texts):
        enc = self.tok(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(
            self.model.device
        )
        e = self.model.get_input_embeddings()(enc.input_ids)
        slot = enc.input_ids == 3
        e = torch.where(slot[..., None], self.P.to(e.dtype)[(slot.cumsum(1) - 1).clamp(min=0)], e)
        return enc, self.model(
            inputs_embeds=e, attention_mask=enc.attention_mask, use_cache=False
        ).logits

    def mean(self, olds, cands):
        _, logits = self.logits([self.prompt(o, c) for o, c in zip(olds, cands)])
        rows = []
        for b, cand in enumerate(cands):
            ids = [self.tok(self.data.titles[i], add_special_tokens=False).input_ids for i in cand]
            rows.append(torch.stack([logits[b, -1, t].float().mean() for t in ids]))
        return torch.stack(rows)

    def likelihood(self, olds, cands):
        rows = []
        for old, cand in zip(olds, cands):
            ends = [
                self.tok(self.data.titles[i] + "\n", add_special_tokens=False).input_ids
                for i in cand
            ]
            enc, logits = self.logits(
                [self.prompt(old, cand) + self.data.titles[i] + "\n" for i in cand]
            )
            logp = logits.float().log_softmax(-1)
            rows.append(
                torch.stack(
                    [
                        logp[c, -len(t) - 1 : -1]
                        .gather(1, torch.tensor(t, device=logp.device)[:, None])
                        .mean()
                        for c, t in enumerate(ends)
                    ]
                )
            )
        return torch.stack(rows)


def adapt(model, names):
    from peft import AdaLoraConfig, get_peft_model

    return get_peft_model(
        model,
        AdaLoraConfig(
            target_modules=names,
            init_r=12,
            target_r=8,
            lora_alpha=32,
            lora_dropout=0.05,
            total_step=100,
            tinit=10,
            tfinal=30,
            deltaT=1,
            orth_reg_weight=0.0,
        ),
    )


def plain_orthogonality(adapter):
    """As peft computes it: one small product after the other."""
    terms = []
    for name, p in adapter.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            cov = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.norm(cov - torch.eye(len(cov), device=cov.device), p="fro"))
    return sum(terms) / len(terms)


# -------------------------------------------------------- CPU (or the GPU at hand), the embedded LM


def prompts_of(r, data, n, C, seed=0):
    which = np.random.default_rng(seed).permutation(len(data.test))[:n]
    olds = [h[h > 0] for h in histories(data, data.test[which], r.history)]
    stored = next(c for c in (15, 20, 100) if c >= C)
    cands = candidates(data, "test", stored)[which][:, :C]
    return olds, cands, [r.prompts.history(o, c)[0] for o, c in zip(olds, cands)]


def our_ranker(lm, data, P, verbalizer, history=10, show=True):
    return make_ranker(
        lm,
        data,
        dict(
            verbalizer=verbalizer,
            show=show,
            order="shuffled",
            history=history,
            max_title=32,
            max_tokens=4000,
            backbone="SASRec",
            backbone_run="",
        ),
        P,
    )


def matmul_rate(device, dtype, n=2048):
    a, b = (
        torch.randn(n, n, dtype=dtype, device=device),
        torch.randn(n, n, dtype=dtype, device=device),
    )
    return 2 * n**3 / times({"mm": lambda: a @ b}, device, 1.0)["mm"]


def flops(model, tokens):
    """2 x parameters of the body x tokens: what a pass over so many tokens costs without
    attention.
    """
    return (
        2
        * sum(
            p.numel()
            for n, p in model.named_parameters()
            if "embed" not in n and "lm_head" not in n and "lora_" not in n
        )
        * tokens
    )


def against_rival(rows, lm, data, device):
    P = random_soft_prompt(lm, K, 0)
    rival, where = Rival(lm, data, P), "cpu" if device.type == "cpu" else "gpu"
    rate = matmul_rate(device, lm.dtype)

    with torch.no_grad():
        alone = SimpleNamespace(rank=0, world=1, device=device, main=False)
        for verbalizer, n, goal in (("mean", 32, 2.2), ("likelihood", 4, 8)):
            r = our_ranker(lm, data, P, verbalizer)
            olds, cands, tails = prompts_of(r, data, n, C)

            # what evaluate.py calls: like lengths together
            def ours():
                return torch.as_tensor(score_tails(r, tails, cands, alone))

            def theirs():
                return torch.cat(
                    [
                        getattr(rival, verbalizer)(olds[i : i + 16], cands[i : i + 16])
                        for i in range(0, n, 16)
                    ]
                )

            a, b = ours().float().cpu().numpy(), theirs().float().cpu().numpy()
            same = np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])
            if same < 0.9:
                sys.exit(
                    f"bench: ours and the rival's {verbalizer} scores correlate by {same:.2f} "
                    "only; they do not do the same work"
                )
            t = times({"ours": ours, "rival": theirs}, device, 20.0, 5)
            rows.append((f"score.{verbalizer}.{where}.vs_rival", t["rival"] / t["ours"], "x", goal))
            rows.append(
                (f"score.{verbalizer}.{where}.requests_per_second", n / t["ours"], "1/s", None)
            )
            if verbalizer == "mean":
                memory = [extra_bytes(f, device) for f in (ours, theirs)]
                rows.append(
                    (
                        f"score.mean.{where}.memory_vs_rival",
                        None if None in memory else memory[0] / memory[1],
                        "share",
                        0.6,
                    )
                )
                rows.append(
                    (
                        f"score.mean.{where}.share_of_matmul_rate",
                        flops(lm.model, sum(map(len, tails))) / t["ours"] / rate,
                        "share",
                        None,
                    )
                )
                rows.append((f"matmul.{where}.rate", rate / 1e9, "GFLOP/s", None))

    r = our_ranker(lm, data, P.requires_grad_(), "mean")
    olds, cands, tails = prompts_of(r, data, 8, C, seed=1)
    truth = torch.arange(8, device=device) % C

    # micro-batches of 4, as distill.py
    def ours():
        P.grad = None
        for i in (0, 4):
            s_BC = score(
                lm,
                read_prefix(lm, r.prompts.prefix, P),
                tails[i : i + 4],
                cands[i : i + 4],
                r.titles,
                "mean",
            )
            (F.cross_entropy(s_BC, truth[i : i + 4], reduction="sum") / 8).backward()

    def theirs():
        P.grad = None
        F.cross_entropy(rival.mean(olds, cands), truth).backward()

    def assembly():
        """Everything but the LM and the verbalizer: samples to prompts, prompts to rows, masks and
        places.
        """
        with torch.no_grad():
            for i in (0, 4):
                part = [
                    r.prompts.history(o, c)[0] for o, c in zip(olds[i : i + 4], cands[i : i + 4])
                ]
                reading.read(
                    idle, SimpleNamespace(prefix=start.prefix, P=None, kv=start.kv), part, at=None
                )

    # the LM with a body that does nothing
    def empty(inputs_embeds, **kw):
        return SimpleNamespace(last_hidden_state=torch.zeros_like(inputs_embeds))

    body = SimpleNamespace(
        base_model=empty, config=lm.model.config, get_input_embeddings=lm.model.get_input_embeddings
    )
    idle, start = (
        replace(lm, model=body, paths=[p for p in lm.paths if p != "fused"]),
        read_prefix(lm, r.prompts.prefix, P.detach()),
    )

    t = times({"ours": ours, "rival": theirs, "assembly": assembly}, device, 20.0, 4)
    rows.append(
        (f"train.stage1.{where}.assembly_share_of_step", t["assembly"] / t["ours"], "share", 0.02)
    )
    rows.append((f"train.stage1.{where}.vs_rival", t["rival"] / t["ours"], "x", 2.2))
    rows.append((f"train.stage1.{where}.samples_per_second", 8 / t["ours"], "1/s", None))
    memory = [extra_bytes(f, device) for f in (ours, theirs)]
    rows.append(
        (
            f"train.stage1.{where}.memory_vs_rival",
            None if None in memory else memory[0] / memory[1],
            "share",
            0.6,
        )
    )

    names = adapt_modules(lm, "qv")
    P.requires_grad_(False)
    adapters = {"ours": adapt(lm.model, names), "rival": adapt(rival.model, names)}
    params = {k: [p for p in a.parameters() if p.requires_grad] for k, a in adapters.items()}
    for a in adapters.values():
        a.train()

    def ours():
        s_BC = score(lm, read_prefix(lm, r.prompts.prefix, P), tails, cands, r.titles, "mean")
        (F.cross_entropy(s_BC, truth) + 0.5 * finetune.orthogonality(adapters["ours"])).backward()
        adapters["ours"].base_model.update_and_allocate(1)
        for p in params["ours"]:
            p.grad = None

    def theirs():
        (
            F.cross_entropy(rival.mean(olds, cands), truth)
            + 0.5 * plain_orthogonality(adapters["rival"])
        ).backward()
        adapters["rival"].base_model.update_and_allocate(1)
        for p in params["rival"]:
            p.grad = None

    t = times({"ours": ours, "rival": theirs}, device, 20.0, 4)
    rows.append((f"train.stage2.{where}.vs_rival", t["rival"] / t["ours"], "x", 2.2))
    rows.append((f"train.stage2.{where}.samples_per_second", 8 / t["ours"], "1/s", None))

    def extras():
        (0.5 * finetune.orthogonality(adapters["ours"])).backward()
        adapters["ours"].base_model.update_and_allocate(1)

    ours()
    for p in params["ours"]:
        p.grad = torch.zeros_like(p)
    t2 = times({"extras": extras}, device, 2.0)
    rows.append(
        (f"train.stage2.{where}.adalora_share_of_step", t2["extras"] / t["ours"], "share", 0.05)
    )


def curves(rows, lm, data, device):
    """What a request costs by prompt length, by number of candidates, and by batch size."""
    where, P = "cpu" if device.type == "cpu" else "gpu", random_soft_prompt(lm, K, 0)
    for verbalizer, points in (
        (
            "mean",
            [(h, 15, 16) for h in (5, 10, 20, 50)]
            + [(10, c, 16) for c in (20, 50, 100)]
            + [(10, 15, b) for b in (1, 2, 4, 8, 32)],
        ),
        ("likelihood", [(10, c, 4) for c in (15, 20, 50, 100)]),
    ):
        for history, c, batch in points:
            r = our_ranker(lm, data, P, verbalizer, history, show=verbalizer == "mean")
            _, cands, tails = prompts_of(r, data, batch, c)
            with torch.no_grad():
                start = read_prefix(lm, r.prompts.prefix, P)
                t = times(
                    {"ours": lambda: score(lm, start, tails, cands, r.titles, verbalizer)},
                    device,
                    4.0,
                    5,
                )["ours"]
            tokens = np.mean([len(x) for x in tails]) + (verbalizer == "likelihood") * np.mean(
                np.diff(r.titles.ptr)[cands].sum(1)
            )
            rows.append(
                (
                    f"curve.{verbalizer}.{where}.history{history}.C{c}.batch{batch}.ms_per_request",
                    1e3 * t / batch,
                    "ms",
                    None,
                )
            )
            rows.append(
                (
                    f"curve.{verbalizer}.{where}.history{history}.C{c}.batch{batch}.tokens",
                    tokens,
                    "tokens",
                    None,
                )
            )


def two_processes(rows):
    """Two processes of one core each against one process of one core, on the same work each."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        rows.append(("score.two_processes.cpu.speedup", None, "x", 1.8))
        return

    def run(n):
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", str(core)], stdout=subprocess.PIPE, text=True
            )
            for core in sorted(os.sched_getaffinity(0))[:n]
        ]
        return sum(float(w.communicate()[0].split()[-1]) for w in workers)

    rows.append(("score.two_processes.cpu.speedup", run(2) / run(1), "x", 1.8))


def worker(core):
    """Prints the requests per second of one process on one core, over 40 seconds."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    device, data = torch.device("cpu"), load_data("ml-100k")
    lm = load_lm("smollm2-135m", device)
    P = random_soft_prompt(lm, K, 0)
    r = our_ranker(lm, data, P, "mean")
    _, cands, tails = prompts_of(r, data, 8, C)
    with torch.no_grad():
        start = read_prefix(lm, r.prompts.prefix, P)
        done, began = [], time.time()
        while time.time() - began < 40:
            t = time.perf_counter()
            score(lm, start, tails, cands, r.titles, "mean")
            done.append(time.perf_counter() - t)
    print(8 / float(np.median(done[1:])))


# ---------------------------------------------------------------- GPU, random LMs of real shapes


def shapes():
    from transformers import LlamaConfig, T5Config

    return {
        "flan-t5-xl": T5Config(
            vocab_size=32128,
            d_model=2048,
            d_kv=64,
            d_ff=5120,
            num_layers=24,
            num_heads=32,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        ),
        "llama-8b": LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
        ),
    }


def random_lm(name, config, device, dtype):
    """load_lm's namespace around random weights of this shape; there is no tokenizer, prompts are
    made of random tokens.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto, kind = (
        (AutoModelForSeq2SeqLM, "encoder-decoder")
        if config.is_encoder_decoder
        else (AutoModelForCausalLM, "decoder")
    )
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = auto.from_config(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    head = model.get_output_embeddings()
    # Flan-T5 has a head of its own
    if head.weight is model.get_input_embeddings().weight and name.startswith("flan"):
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    lm = LM(
        name=name,
        folder="",
        kind=kind,
        model=model,
        tok=None,
        device=device,
        dtype=dtype,
        head_VD=head.weight,
        bias_V=None,
        mask_id=config.vocab_size - 1,
        start=[],
        end=[1],
        max_tokens=4000,
        special=set(),
        sep=[5],
    )
    lm.read_as(check.find(lm, checked=False))
    return lm


def random_prompts(lm, n, tokens, T=10, seed=0):
    rng = np.random.default_rng(seed)
    V, items = lm.head_VD.shape[0] - 200, 1000
    ptr = np.concatenate([[0], np.arange(items + 1) * T])
    titles = Titles(
        ptr=ptr,
        tok=rng.integers(10, V, items * T),
        vocab=np.arange(V + 200),
        index=np.arange(V + 200),
        head=lm.head_VD.detach(),
        bias=None,
    )
    prefix = np.concatenate([rng.integers(10, V, 10), np.full(K, SLOT), rng.integers(10, V, 10)])
    tails = [np.append(rng.integers(10, V, tokens - len(prefix) - 1), MASK) for _ in range(n)]
    return titles, prefix, tails, rng.integers(1, items + 1, (n, C))


def big_shapes(rows, device, configs, tokens=600, limit_gb=24, dtype=torch.bfloat16):
    """ms per request in batch and alone, FLOP utilisation, and both stages' training within
    limit_gb of the GPU's memory.
    """
    rate = matmul_rate(device, dtype, 8192 if device.type == "cuda" else 512)
    # a function each, so that one LM is gone before the next comes
    for name, config in configs.items():
        big_shape(rows, device, name, config, rate, tokens, limit_gb, dtype)


def big_shape(rows, device, name, config, rate, tokens, limit_gb, dtype):
    where = "gpu" if device.type == "cuda" else "cpu"
    lm = random_lm(name, config, device, dtype)
    P = random_soft_prompt(lm, K, 0)
    titles, prefix, tails, cands = random_prompts(lm, 32, tokens)
    with torch.no_grad():
        start = read_prefix(lm, prefix, P)
        batch = times(
            {"ours": lambda: score(lm, start, tails, cands, titles, "mean")}, device, 5.0
        )["ours"]
        one = times(
            {"ours": lambda: score(lm, start, tails[:1], cands[:1], titles, "mean")}, device, 2.0
        )["ours"]
    read = sum(map(len, tails)) + (lm.kind != "decoder") * len(prefix) * len(tails)
    work = (
        flops(lm.model, read)
        if lm.kind == "decoder"
        else 2
        * sum(p.numel() for n, p in lm.model.encoder.named_parameters() if "embed" not in n)
        * read
    )
    rows.append(
        (
            f"score.{name}.{where}.ms_per_request",
            1e3 * batch / len(tails),
            "ms",
            4 if name == "flan-t5-xl" else None,
        )
    )
    rows.append((f"score.{name}.{where}.ms_alone", 1e3 * one, "ms", None))
    rows.append(
        (f"score.{name}.{where}.mfu", work / batch / rate, "share of the measured matmul rate", 0.5)
    )
    rows.append(
        (f"score.{name}.{where}.vs_paper_request", PAPER_SECONDS / (batch / len(tails)), "x", None)
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    P = P.requires_grad_()
    truth = torch.arange(8, device=device) % C

    def step(n=8, micro=4):
        P.grad = None
        for i in range(0, n, micro):
            s_BC = score(
                lm,
                read_prefix(lm, prefix, P),
                tails[i : i + micro],
                cands[i : i + micro],
                titles,
                "mean",
            )
            (F.cross_entropy(s_BC, truth[i : i + micro], reduction="sum") / n).backward()

    try:
        t = times({"step": step}, device, 5.0)["step"]
        rows.append((f"train.{name}.{where}.stage1_samples_per_second", 8 / t, "1/s", None))
        rows.append(
            (
                f"train.{name}.{where}.mfu",
                2 * work * 8 / len(tails) / t / rate,
                "share of the measured matmul rate",
                0.4,
            )
        )
        rows.append(
            (
                f"train.{name}.{where}.peak_gb",
                torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
                "GB",
                limit_gb if name == "flan-t5-xl" else None,
            )
        )
    except torch.OutOfMemoryError:
        rows.append((f"train.{name}.{where}.peak_gb", None, "GB, did not fit", limit_gb))


# ---------------------------------------------------------------- the memory account


def saved_tensors(f, model):
    """{(shape, dtype): (how many, bytes)} of what autograd keeps for backward while f runs, the
    model's own parameters left out. A view keeps what it is a view of, so bytes are of whole
    storages, each once.
    """
    own, seen, kinds = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, {}

    def keep(t):
        storage = t.untyped_storage()
        if (
            t.device.type != "meta"
            and storage.data_ptr() not in own
            and storage.data_ptr() not in seen
        ):
            # held, so that no later tensor gets its address
            seen[storage.data_ptr()] = t
            n, size = kinds.get((tuple(t.shape), t.dtype), (0, 0))
            kinds[tuple(t.shape), t.dtype] = n + 1, size + storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        f()
    return kinds


def account(rows, device, name, config, tokens=600, limit_gb=24, dtype=torch.bfloat16):
    """Every tensor that both stages' training and scoring hold for prompts of so many tokens, one
    prompt a pass; and what a pass measures.

    On a machine without a GPU this is the evidence that an LM fits into a card of limit_gb: the
    list is the same on both; temporaries differ with the kernels, so the measured peak on this
    machine stands beside it.
    """
    lm, gb = random_lm(name, config, device, dtype), 2**30
    titles, prefix, tails, cands = random_prompts(lm, 1, tokens)
    weights = sum(
        p.numel() * p.element_size() for p in {id(p): p for p in lm.model.parameters()}.values()
    )
    print(
        f"\n{name}: {sum(p.numel() for p in lm.model.parameters()) / 1e9:.2f} B parameters, "
        f"weights {weights / gb:.2f} GB"
    )

    def show(what, model, fixed, f):
        kinds = saved_tensors(f, model)
        total = sum(b for _, b in kinds.values())
        print(f"{what}: kept for backward by one prompt of {tokens} tokens, {total / gb:.2f} GB")
        for (shape, kind), (n, size) in sorted(kinds.items(), key=lambda x: -x[1][1])[:12]:
            print(f"  {n:4d} x {str(shape):28} {str(kind)[6:]:9} {size / 2**20:9.1f} MB")
        f()
        peak = extra_bytes(f, device)
        rows.append(
            (
                f"account.{name}.{what}.kept_gb",
                (weights + fixed + total) / gb,
                f"GB in all (weights {weights / gb:.2f}, trained and its state {fixed / gb:.3f})",
                limit_gb,
            )
        )
        rows.append(
            (
                f"account.{name}.{what}.measured_gb",
                None if peak is None else (weights + fixed + peak) / gb,
                "GB: weights and state, plus a pass's measured peak on this machine",
                limit_gb,
            )
        )

    with torch.no_grad():
        peak = extra_bytes(
            lambda: score(
                lm,
                read_prefix(lm, prefix, random_soft_prompt(lm, K, 0)),
                tails,
                cands,
                titles,
                "mean",
            ),
            device,
        )
    rows.append(
        (
            f"account.{name}.scoring.measured_gb",
            None if peak is None else (weights + peak) / gb,
            "GB: weights, plus a pass's measured peak on this machine",
            limit_gb,
        )
    )
    P = random_soft_prompt(lm, K, 0).requires_grad_()

    def loss():
        return F.cross_entropy(
            score(lm, read_prefix(lm, prefix, P), tails, cands, titles, "mean"),
            torch.zeros(1, dtype=torch.long, device=device),
        )

    # P, its gradient, Lion's momentum
    show("stage1", lm.model, 3 * P.numel() * 4, lambda: loss().backward())
    P.requires_grad_(False)
    adapter = adapt(lm.model, adapt_modules(lm, "qv")).train()
    trained = sum(p.numel() * p.element_size() for p in adapter.parameters() if p.requires_grad)
    # and AdaLoRA's two averages
    show("stage2", adapter, 3 * trained + 2 * trained, lambda: loss().backward())
    checkpoint_layers(lm.model)
    show("stage2_gradient_checkpointing", adapter, 5 * trained, lambda: loss().backward())


@click.command(context_settings={"show_default": True})
@click.option(
    "--account",
    "listing",
    is_flag=True,
    help="only the memory account of Flan-T5-XL's shape: every tensor training keeps, and "
    "measured peaks (16 GB)",
)
@click.option(
    "--quick", is_flag=True, help="the ratios only, without the curves and the two processes"
)
@click.option("--threads", default=2, type=click.IntRange(1), help="threads on the CPU")
@click.option("--worker", "core", default=None, type=int, hidden=True)
def main(listing, quick, threads, core):
    """The LM's part of scoring and of both training stages against plain transformers."""
    if core is not None:
        return worker(core)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    if listing:
        account(rows, device, "flan-t5-xl", shapes()["flan-t5-xl"])
        return report(rows, threads)
    data = load_data("ml-100k")
    lm = load_lm("smollm2-135m", device)
    if not quick:
        curves(rows, lm, data, device)
    against_rival(rows, lm, data, device)
    del lm
    if device.type == "cuda":
        big_shapes(rows, device, shapes())
    elif not quick:
        two_processes(rows)
    # never a guessed number: the same command on a GPU fills these
    if device.type == "cpu":
        for name in shapes():
            rows += [
                (
                    f"score.{name}.gpu.ms_per_request",
                    None,
                    "ms",
                    4 if name == "flan-t5-xl" else None,
                ),
                (f"score.{name}.gpu.mfu", None, "share", 0.5),
                (f"train.{name}.gpu.mfu", None, "share", 0.4),
                (f"train.{name}.gpu.peak_gb", None, "GB", 24 if name == "flan-t5-xl" else None),
            ]
    report(rows, threads)


if __name__ == "__main__":
    main()
