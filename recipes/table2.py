"""Table II whole: every system that DELRec is compared with, as options of the four scripts, on the
same samples and candidates and with the same LM. docs/methods.md says what the other methods are.
"""

from dataclasses import dataclass
from pathlib import Path

from delrec.evaluation.wording import as_markdown
from recipes.runs import Plan, Runs, each_seed, evaluate, more_seeds, of_decoders

BACKBONES = ["sasrec", "gru4rec", "caser"]
TITLES = "minilm"  # whose vectors of titles are read where no LM of --llm writes any
POOL = 20  # LlamaRec's list of its backbone


@dataclass
class Method:
    """A system of Table II: its flags, and where it is not what its authors made."""

    differs: str
    flags: str = ""  # of train_backbone.py, or of finetune.py
    reads: str = "titles"  # finetune.py --input
    backbone: str = "sasrec"  # whose lists and vectors an LM reads


# of train_backbone.py
CONVENTIONAL = {
    "seqsim": Method("vectors of MiniLM, not of ada-002", f"--model seqsim --text {TITLES}"),
    "bert4rec": Method("", "--model bert4rec"),
    "llm2bert4rec": Method(
        "vectors of MiniLM, not of PaLM; PCA, not classes of products",
        f"--model bert4rec --text {TITLES} --text-in start",
    ),
    "kda": Method(
        "latent relations from titles alone; no relation of products, no time",
        f"--model kda --text {TITLES}",
    ),
}
# of finetune.py, none with stage 1
OF_LMS = {
    "llara": Method("titles by their likelihood; AdaLoRA", "--curriculum batch", reads="hybrid"),
    "llamarec": Method(
        "AdaLoRA; ranks the stored candidates here, its backbone's lists in llamarec/",
        f"--verbalizer letter --loss letter --candidates {POOL} --no-calibrate --history 20",
        backbone="lrurec",
    ),
    "recranker": Method(
        "its list task alone; no ratings; hints out of fold",
        "--verbalizer letter --hint backbone --orders 2 --draw importance",
    ),
    "trsr-words": Method("summaries are words of the titles", "--summary words"),
    "trsr-recurrent": Method("summaries by --llm, not by 30B weights", "--summary recurrent"),
    "llmseqprompt": Method(
        "likelihood of the candidates, nothing is sampled; its neighbours in llmseqprompt/",
        "--loss titles --verbalizer likelihood",
    ),
    "e4srec": Method("the LM of --llm, AdaLoRA", reads="ids"),
}
# what only a decoder-only LM can do: it writes, or its letter stands among all tokens
OF_DECODERS = ("llamarec", "trsr-recurrent", "llmseqprompt")


def table2(plan: Plan) -> Path:
    """Every system of the paper's Table II: backbones, titles in conventional models (LLMSEQSIM,
    LLM2BERT4Rec, KDA_LRD-style), the plain LM, other methods with an LM (LLaRA, LlamaRec,
    RecRanker, LLM-TRSR, LLMSEQPROMPT, E4SRec), DELRec with each backbone and without stage 1. Two
    more tables beside it: llamarec/ (inside its backbone's lists) and llmseqprompt/ (with the
    neighbours of what it writes). An LM that is no decoder has neither of these two, nor the
    summaries that it would write.
    """
    of_lms = of_decoders(plan, list(OF_LMS), OF_DECODERS)
    if plan.input == "ids":  # no-prompt is E4SRec then
        of_lms.remove("e4srec")
    names = each_seed(plan, lambda runs: rows(runs, of_lms)) + more_seeds(plan, BACKBONES)
    flags = ["--dataset", plan.dataset, "--llm", plan.llm, "--reference", "sasrec-s0"]
    tables_beside(plan, of_lms)
    out = evaluate(plan, "table2", names, *flags)
    if not plan.dry_run:
        lines = differences([*CONVENTIONAL, *of_lms])
        (out / "differs.md").write_text(lines, encoding="utf-8")
        print(f"\n{lines}", flush=True)
    return out


def rows(runs: Runs, of_lms: list[str]) -> list[str]:
    """The runs of one seed."""
    names = [runs.row(model) for model in BACKBONES]
    names += [runs.conventional(name, method.flags) for name, method in CONVENTIONAL.items()]
    names += [of_lm(runs, name) for name in of_lms]
    names.append(runs.variant("no-prompt"))
    return names + [runs.delrec(model) for model in BACKBONES]


def of_lm(runs: Runs, name: str) -> str:
    """The run of another method with an LM."""
    method = OF_LMS[name]
    backbone = runs.backbone(method.backbone)
    return runs.tuned(name, "none", method.flags.split(), method.reads, backbone=backbone)


def tables_beside(plan: Plan, of_lms: list[str]) -> None:
    """LlamaRec as two stages, and LLMSEQPROMPT with and without the neighbours of what it writes,
    of every seed."""
    if "llmseqprompt" in of_lms:
        runs = each_seed(plan, lambda runs: [runs.row(), of_lm(runs, "llmseqprompt")])
        evaluate(plan, "llmseqprompt", runs, "--neighbours", TITLES)
    if "llamarec" in of_lms:
        runs = each_seed(plan, lambda runs: [runs.row("lrurec"), of_lm(runs, "llamarec")])
        evaluate(plan, "llamarec", runs, "--candidates", POOL, "--two-stage", "backbone")


def differences(names: list[str]) -> str:
    """What differs from each method's own paper, as a table in Markdown."""
    methods = CONVENTIONAL | OF_LMS
    of = {name: methods[name].differs for name in names}
    said = (
        "In kind: the other methods have this project's settings (PAPER=1 changes DELRec's rows "
        "alone). What differs from their own papers:\n"
    )
    grid = [["row", "differs"], *([name, differs] for name, differs in of.items() if differs)]
    return "\n".join([said, *as_markdown(grid)]) + "\n"
