"""Table II whole: every system that DELRec is compared with, as options of the four scripts, on the
same samples and candidates and with the same LM. docs/methods.md says what the other methods are.

The small budget, which is the default, is meant for two hours on two cores (ml-100k, one seed; 2.3
by the rates of recipes/minutes.py, which says first what each row takes): 1,024 windows for rows
that read vectors, 256 samples for those that read titles, which are validated once; 100 validation
samples choose a step, a calibration, a weight; 300 test samples, the same for all rows. KDA trains
3 epochs, an LM summarises 10 items, LLaRA's map learns at ten times its rate. More, with flags:
--budget 50000 --val-samples 1000 --test-samples 0 --seeds 3 has none of these limits.

What differs of each method from its own paper stands in the table's last column; what those papers
print, below it (data/papers.csv).
"""

from dataclasses import dataclass, replace
from pathlib import Path

from delrec import runtime
from delrec.runtime import config_of_run, folder_of, write_json
from recipes import minutes
from recipes.papers import printed_lines
from recipes.runs import (
    Plan,
    Runs,
    compare_flags,
    each_seed,
    evaluate,
    more_seeds,
    of_decoders,
)
from recipes.stage import stage, typed

BACKBONES = ["sasrec", "gru4rec", "caser"]
TITLES = "minilm"  # whose vectors of titles are read where no LM of --llm writes any
POOL = 20  # LlamaRec's list of its backbone
SMALL = 1024  # windows of the small budget, at most


@dataclass
class Method:
    """A system of Table II, or a control of one: its flags, and where it is not its authors'."""

    name: str
    differs: str
    flags: str = ""  # of train_backbone.py, or of finetune.py
    small: str = ""  # more of them, at the small budget
    reads: str = "titles"  # finetune.py --input
    backbone: str = "sasrec"  # whose lists and vectors an LM reads


SEQSIM = f"--model seqsim --text {TITLES}"
LLM2BERT4REC = f"--model bert4rec --text {TITLES} --text-in start"
KDA = f"--model kda --text {TITLES}"
LLARA = "--curriculum batch --show"
LLAMAREC = f"--verbalizer letter --loss letter --candidates {POOL} --no-calibrate --history 20"
RECRANKER = "--verbalizer letter --orders 2 --draw importance"
# its maps hardly move in few steps, as they begin to learn when the rate falls
FASTER = "--lr-maps 1e-2"
FEW = "--epochs 3"  # a KDA's epoch takes three minutes of a core, ranking seven
SHORTER = "--history 10"  # two blocks to summarise, not five

# of train_backbone.py
CONVENTIONAL = {
    "seqsim": Method("LLMSEQSIM", "vectors of MiniLM, not of ada-002", SEQSIM),
    "bert4rec": Method("BERT4Rec", "settings of arXiv 2309.07602", "--model bert4rec"),
    "llm2bert4rec": Method(
        "LLM2BERT4Rec",
        "vectors of MiniLM, not of PaLM; PCA, not classes of products",
        LLM2BERT4REC,
    ),
    "kda": Method(
        "KDA_LRD", "latent relations from titles alone; no relation of products, no time", KDA, FEW
    ),
}
# of finetune.py, none with stage 1
OF_LMS = {
    "llara": Method(
        "LLaRA", "titles by their likelihood; one linear map; AdaLoRA", LLARA, FASTER, "hybrid"
    ),
    "llamarec": Method(
        "LlamaRec",
        "AdaLoRA; ranks the stored candidates here, its backbone's lists in llamarec/",
        LLAMAREC,
        backbone="lrurec",
    ),
    "recranker": Method(
        "RecRanker",
        "its list task alone; no ratings; hints out of fold; AdaLoRA",
        f"{RECRANKER} --hint backbone",
    ),
    "trsr-words": Method(
        "LLM-TRSR", "summaries are words of the titles, nobody writes them", "--summary words"
    ),
    "trsr-recurrent": Method(
        "LLM-TRSR",
        "summaries by {llm}, greedy, 40 tokens, not by 30B weights",
        "--summary recurrent",
        SHORTER,
    ),
    "llmseqprompt": Method(
        "LLMSEQPROMPT",
        "likelihood of the candidates, nothing is sampled; its neighbours in llmseqprompt/",
        "--loss titles --verbalizer likelihood",
    ),
    "e4srec": Method("E4SRec", "the LM of --llm, AdaLoRA", reads="ids"),
}
# what only a decoder-only LM can do: it writes, or its letter stands among all tokens
OF_DECODERS = ("llamarec", "trsr-recurrent", "llmseqprompt")
# row -> its controls, each the same but for what is said
CONTROLS = {
    "seqsim": {
        "seqsim-permuted": Method("LLMSEQSIM", "other items' titles", f"{SEQSIM} --permute-text")
    },
    "llm2bert4rec": {
        "llm2bert4rec-permuted": Method(
            "LLM2BERT4Rec", "other items' titles", f"{LLM2BERT4REC} --permute-text"
        )
    },
    "kda": {
        "kda-permuted": Method("KDA_LRD", "other items' titles", f"{KDA} --permute-text", FEW),
        "kda-untold": Method(
            "KDA_LRD", "titles tell no relation", "--model kda --latent-weight 0", FEW
        ),
        "kda-single": Method("KDA_LRD", "no latent relation", "--model kda --latent 0", FEW),
    },
    "llara": {
        "llara-permuted": Method(
            "LLaRA", "other items' vectors", f"{LLARA} --permute-vectors", FASTER, "hybrid"
        ),
        "llara-off": Method("LLaRA", "no curriculum", "--curriculum off --show", FASTER, "hybrid"),
        "llara-titles": Method("LLaRA", "no vectors", "--show"),
    },
    "llamarec": {
        "llamarec-pool": Method(
            "LlamaRec",
            "trained on its backbone's lists, out of fold",
            f"{LLAMAREC} --pool backbone",
            backbone="lrurec",
        )
    },
    "recranker": {
        "recranker-permuted": Method(
            "RecRanker", "another user's hint", f"{RECRANKER} --hint permuted"
        ),
        "recranker-shuffled": Method(
            "RecRanker", "the hint in any order", f"{RECRANKER} --hint shuffled"
        ),
        "recranker-no-hint": Method("RecRanker", "no hint", f"{RECRANKER} --hint none"),
    },
    "trsr-words": {
        "trsr-words-permuted": Method(
            "LLM-TRSR", "another user's words", "--summary permuted-words"
        ),
        "trsr-empty": Method("LLM-TRSR", "an empty summary", "--summary empty"),
        "trsr-last": Method("LLM-TRSR", "the last 3 items, no summary", "--history 3"),
    },
    "trsr-recurrent": {
        "trsr-recurrent-permuted": Method(
            "LLM-TRSR",
            "another user's summary",
            "--summary permuted-recurrent",
            SHORTER,
        )
    },
}
EACH_CONTROL = {name: method for found in CONTROLS.values() for name, method in found.items()}


# ---------------------------------------------------------------- the recipe


def table2(plan: Plan) -> Path:
    """Every system of the paper's Table II: backbones, titles in conventional models (LLMSEQSIM,
    LLM2BERT4Rec, KDA_LRD-style), the plain LM, other methods with an LM (LLaRA, LlamaRec,
    RecRanker, LLM-TRSR, LLMSEQPROMPT, E4SRec), DELRec with each backbone and without stage 1. Two
    more tables beside it: llamarec/ (inside its backbone's lists) and llmseqprompt/ (with the
    neighbours of what it writes). An LM that is no decoder has neither of these two, nor the
    summaries that it would write. --controls: also each method without what its idea is.

    The small budget is the default: ml-100k, one seed, two hours on two cores. What each row takes
    is printed first.
    """
    of_lms = of_decoders(plan, list(OF_LMS), OF_DECODERS)
    if plan.input == "ids":  # no-prompt is E4SRec then
        of_lms.remove("e4srec")
    if not plan.dry_run:
        ahead = replace(plan, dry_run=True, printed=[], quiet=True, jobs=1)
        make_table(ahead, of_lms)
        minutes.say(ahead)
    out = make_table(plan, of_lms)
    if plan.dry_run:
        minutes.say(plan)
    return out


def make_table(plan: Plan, of_lms: list[str]) -> Path:
    """The folder of the table, once its runs and its table are made."""
    names = each_seed(plan, lambda runs: rows(runs, of_lms)) + more_seeds(plan, BACKBONES)
    tables_beside(plan, of_lms)
    flags = ["--dataset", plan.dataset, "--llm", plan.llm, "--reference", "sasrec-s0"]
    notes = Runs(plan, plan.dataset, 0).table_folder("table2") / "notes.json"
    if not plan.dry_run:
        notes.parent.mkdir(parents=True, exist_ok=True)
        write_json(notes, notes_of(plan, of_lms))
    return evaluate(plan, "table2", names, *flags, *compared(plan, of_lms), "--notes", notes)


def rows(runs: Runs, of_lms: list[str]) -> list[str]:
    """The runs of one seed, controls beside their row."""
    names = [runs.row(model) for model in BACKBONES]
    for name in CONVENTIONAL:
        names += [conventional(runs, row) for row in with_controls(runs.plan, name)]
    for name in of_lms:
        names += [of_lm(runs, row) for row in with_controls(runs.plan, name)]
    names.append(runs.variant("no-prompt"))
    return names + [runs.delrec(model) for model in BACKBONES]


def with_controls(plan: Plan, name: str) -> list[str]:
    """A row, and with --controls those of it."""
    return [name, *(CONTROLS.get(name, ()) if plan.controls else ())]


def flags_of(plan: Plan, method: Method) -> list:
    """The flags of a method at the plan's budget."""
    flags = method.flags.split()
    if plan.budget <= SMALL:
        flags += method.small.split()
    return flags


def conventional(runs: Runs, name: str) -> str:
    """The run of a conventional model that reads titles, or of BERT4Rec."""
    method = (CONVENTIONAL | EACH_CONTROL)[name]
    return runs.conventional(name, flags_of(runs.plan, method))


def of_lm(runs: Runs, name: str) -> str:
    """The run of another method with an LM. One that reads titles where DELRec reads vectors is
    validated less often: that costs as much as its training."""
    plan, method = runs.plan, (OF_LMS | EACH_CONTROL)[name]
    if plan.input == "ids" and method.reads != "ids":
        plan = replace(plan, evals=max(1, min(plan.budget // 2000, 6)))
        runs = Runs(plan, runs.dataset, runs.seed, runs.job)
    backbone = backbone_of(runs, method)
    flags = flags_of(plan, method)
    return runs.tuned(name, "none", flags, method.reads, backbone=backbone)


def backbone_of(runs: Runs, method: Method) -> str:
    """The backbone of a method. LlamaRec's says nothing in a training prompt, but with --pool."""
    if method.backbone == "sasrec":
        return runs.backbone()
    is_read = "--pool" in method.flags
    return runs.backbone(method.backbone, folds=None if is_read else 0, beside=is_read)


def compared(plan: Plan, of_lms: list[str]) -> list[str]:
    """The flags of the planned pairs: titles in BERT4Rec against none, a row against a control."""
    pairs = [("llm2bert4rec", "bert4rec")]
    if plan.controls:
        for row in (*CONVENTIONAL, *of_lms):
            pairs += [(row, control) for control in CONTROLS.get(row, ())]
        if "trsr-recurrent" in of_lms:  # an empty summary is the same one for both
            pairs.append(("trsr-recurrent", "trsr-empty"))
    return compare_flags(plan, pairs)


def tables_beside(plan: Plan, of_lms: list[str]) -> None:
    """LlamaRec as two stages, and LLMSEQPROMPT with and without the neighbours of what it writes,
    of every seed; what LLaRA writes of its own accord, once."""
    if "llmseqprompt" in of_lms:
        runs = each_seed(plan, lambda runs: [runs.row(), of_lm(runs, "llmseqprompt")])
        shuffled = ["--shuffle-history"] if plan.controls else []
        evaluate(plan, "llmseqprompt", runs, "--neighbours", TITLES, *shuffled)
    if "llamarec" in of_lms:
        runs = each_seed(plan, two_stages)
        evaluate(plan, "llamarec", runs, "--two-stage", "backbone")
        if plan.controls:
            evaluate(plan, "llamarec-shuffled", runs, "--two-stage", "shuffled")
    if "llamarec" in of_lms:  # a decoder
        written_freely(Runs(plan, plan.dataset, 0))


def two_stages(runs: Runs) -> list[str]:
    """LlamaRec's backbone and LlamaRec, of one seed."""
    return [backbone_of(runs, OF_LMS["llamarec"]), of_lm(runs, "llamarec")]


def written_freely(runs: Runs) -> None:
    """Has LLaRA answer of its own accord, unless it has: how many answers are valid."""
    name = of_lm(runs, "llara")
    args = ["evaluate.py", "--ckpt", name, "--free", "--val-samples", runs.plan.val_samples]
    if runs.plan.dry_run:
        runs.print_once(typed(args, runs.plan.procs))
    elif not (runtime.ROOT / "runs" / name / "free.json").exists():
        stage(None, *args, procs=runs.plan.procs)


# ---------------------------------------------------------------- what the table says of its rows


def notes_of(plan: Plan, of_lms: list[str]) -> dict:
    """What evaluate.py --notes adds to the table: what differs from each method's own paper, what
    that paper prints, why an LM may be at chance."""
    methods = {row: (CONVENTIONAL | OF_LMS)[row] for row in (*CONVENTIONAL, *of_lms)}
    if plan.input == "ids":
        methods["no-prompt"] = OF_LMS["e4srec"]
    said = {
        row: f"{method.name}-style, in kind: {method.differs.format(llm=plan.llm)}"
        for row, method in methods.items()
    }
    controls = [row for of in methods if plan.controls for row in CONTROLS.get(of, ())]
    said |= {row: f"control: {EACH_CONTROL[row].differs}" for row in controls}
    how = "by its paper's choices" if plan.paper else "in kind"
    said |= {row: f"DELRec {how}" for row in delrec_rows(plan)}
    few = f"{plan.budget} training samples or fewer are few for {plan.llm}"
    lms = [row for row in said if row in OF_LMS or row in delrec_rows(plan)]
    lms += [row for row in controls if not EACH_CONTROL[row].flags.startswith("--model")]
    below = [
        "in kind: with this project's settings, split and candidates; "
        + ("DELRec's rows alone by its paper's" if plan.paper else "PAPER=1: DELRec's by its own"),
        *ten_summaries(plan, of_lms),
        *printed_lines(list(methods)),
    ]
    return {
        "head": "what differs from its paper",
        "rows": said,
        "below": below,
        "at_chance": dict.fromkeys([*lms, "no-prompt"], few),
    }


def delrec_rows(plan: Plan) -> list[str]:
    """The rows of DELRec."""
    own = ["delrec", *(f"delrec-{model}" for model in BACKBONES[1:])]
    return own if plan.input == "ids" else ["no-prompt", *own]


def ten_summaries(plan: Plan, of_lms: list[str]) -> list[str]:
    """Where ten of the summaries that the LM wrote can be read."""
    if "trsr-recurrent" not in of_lms:
        return []
    home = Runs(plan, plan.dataset, 0).home
    run = config_of_run(runtime.ROOT / "runs" / home / "trsr-recurrent-s0")
    page = folder_of("data", plan.dataset) / f"summaries-{run['summaries']}.txt"
    return [f"trsr-recurrent: summaries by {plan.llm}; ten of them: {page}"]
