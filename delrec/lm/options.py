"""The options of finetune.py and distill.py that one idea or one paper alone has."""

import click

from delrec.ranges import ABOVE_0, FROM_0, Number

# a small LM (SLMRec)
slmrec = (
    click.option(
        "--layers",
        type=click.IntRange(1),
        help="leave only the first so many layers of the LM; the run's lm/ holds what is left",
    ),
    click.option(
        "--teacher", help="run of finetune.py that teaches this LM (SLMRec); its prompts are used"
    ),
    click.option(
        "--blocks",
        type=click.IntRange(1),
        help="blocks that teacher and student are cut into, b; the most up to 4 that divide both",
    ),
    click.option(
        "--lambda-cos",
        type=FROM_0,
        help="weight l1 of the states' direction; 1 with a teacher (the paper's)",
    ),
    click.option(
        "--lambda-norm",
        type=FROM_0,
        help="weight l2 of the states' distance; with a teacher .1 (the paper's), of its square "
        "1e-4",
    ),
    click.option(
        "--norm",
        default="l2",
        type=click.Choice(["l2", "squared"]),
        help="the states' distance: as the paper's code takes it, or squared as it prints it",
    ),
    click.option(
        "--lambda-logits",
        default=0.0,
        type=FROM_0,
        help="weight of KL(teacher || student) of the asked items' scores (the control: plain "
        "distillation, which the paper does not do)",
    ),
    click.option(
        "--lambda-ms",
        type=FROM_0,
        help="weight l3 of the inner blocks' own predictions; .1 with a teacher (paper: .01 to 1); "
        "needs none",
    ),
)

# the adapters of the LM
adalora = (
    click.option(
        "--adapt",
        default="qv",
        type=click.Choice(["qv", "mlp", "linear", "all"]),
        help="adapt the attention's q and v (DELRec), the MLP (SLMRec's code), or every linear "
        "layer; all: no adapters, the weights of the LM's layers themselves train (a control), "
        "which are written to lm/",
    ),
    click.option(
        "--init-r", default=12, type=click.IntRange(2), help="rank each layer starts with"
    ),
    click.option(
        "--target-r", default=8, type=click.IntRange(1), help="mean rank left after reallocation"
    ),
    click.option("--alpha", default=32, type=click.IntRange(1), help="scale of the adapters"),
    click.option(
        "--dropout",
        default=0.05,
        type=Number(0, 0.95),
        help="dropout in front of the adapters",
    ),
    click.option(
        "--orthogonal", default=0.5, type=FROM_0, help="weight of AdaLoRA's orthogonality term"
    ),
    click.option(
        "--prune-end",
        default=0.2,
        type=Number(0, 1, min_open=True),
        help="share of the steps after which ranks stay as they are (cut from a fifth of that on); "
        "no earlier step can be the best",
    ),
)

# stage 1 on histories that nobody has
augment = (
    click.option(
        "--augment",
        type=click.Choice(["all", "crop", "drop", "splice", "walk", "random"]),
        help="with --input ids: RPS on histories that nobody has, answered by the backbone as it "
        "goes. crop: a part of a user's; drop: without a fifth of the items; splice: half of one "
        "user's, half of another's; walk: the backbone goes on from one; all: these in turn; "
        "random: drawn items (a control)",
    ),
    click.option(
        "--soft",
        type=ABOVE_0,
        metavar="T",
        help="with --augment: RPS learns the backbone's softmax at temperature T over its best 100 "
        "and the rest, not the order of its best --h",
    ),
)

# histories whose items carry the user's state
user_states = (
    click.option(
        "--user-states",
        type=click.Choice(["backbone", "permuted"]),
        help="with --input ids: each item of a history also tells the LM the backbone's state "
        "after it, by a map that stage 2 keeps with the soft prompt; needs a backbone of "
        "train_backbone.py --folds. permuted: the state of somebody else (a control)",
    ),
)

# on top of the backbone
residual = (
    click.option(
        "--residual",
        type=click.Choice(["backbone", "permuted"]),
        help="add what the LM says to the backbone's scores, which the run begins as; needs a "
        "backbone of train_backbone.py --folds. permuted: to those after somebody else's history "
        "(a control)",
    ),
    click.option(
        "--residual-dropout",
        default=0.0,
        type=Number(0, 0.95),
        help="with --residual: share of the training targets at which the LM must do without the "
        "backbone",
    ),
    click.option(
        "--residual-counts",
        is_flag=True,
        help="with --residual and --input ids: begin as the backbone fused with co-occurrence and "
        "title similarity (evaluate.py --fuse, the weights chosen on --val-samples of validation's "
        "second half); the weights train. In training the counts are without the users of the "
        "sample's fold",
    ),
    click.option(
        "--lr-residual",
        type=ABOVE_0,
        help="with --residual: learning rate of the map that what the LM says goes through, which "
        "begins at 0; 1e-5; with titles of the weights of both scores; 1e-2",
    ),
)

# taught by conventional models
ensemble = (
    click.option(
        "--kd",
        multiple=True,
        callback=lambda ctx, param, value: list(value) or None,
        metavar="RUN",
        help="with --input ids: also learn what this run of train_backbone.py --folds says of all "
        "items, out of fold; may be repeated, their standardised scores are averaged; "
        "co-occurrence beside a run: what stood near the last items",
    ),
    click.option(
        "--kd-weight",
        type=Number(0, 1),
        help="with --kd: a, in L = (1 - a) CE + a T^2 KL(teachers || LM); .5",
    ),
    click.option(
        "--kd-temp",
        type=ABOVE_0,
        help="with --kd: T, above 1 also for what the teachers hold unlikely; 1",
    ),
    click.option(
        "--kd-permute",
        is_flag=True,
        help="with --kd: each training target learns what they say of another one (the control)",
    ),
)

# against learning by heart
averaged = (
    click.option(
        "--ema",
        default=0.0,
        type=Number(0, 1, max_open=True),
        help="validate and keep the mean of the steps since ranks were final, each weighing so "
        "many times the next one (.999); 0: the step itself",
    ),
    click.option(
        "--choose",
        default="full",
        type=click.Choice(["full", "candidates"]),
        help="the step is chosen by NDCG@10 over all items, where the LM ranks them all at once; "
        "candidates: among the stored candidates, as the weight of a fusion is",
    ),
    click.option(
        "--drop-items",
        default=0.0,
        type=Number(0, 0.95),
        help="with --input ids: share of the history items whose vector a training prompt lacks",
    ),
    click.option(
        "--r-drop",
        default=0.0,
        type=FROM_0,
        metavar="A",
        help="with --input ids: weight of two passes of each prompt, with other dropout, being "
        "alike (R-Drop; .5 is a beginning), at twice the work; 0: one pass",
    ),
)

# stage 1's lists in stage 2
kept = (
    click.option(
        "--keep-rps",
        default=0.0,
        type=FROM_0,
        metavar="W",
        help="with --input ids: weight of stage 1's loss on the backbone's lists beside stage 2's, "
        "falling to 0 at two thirds of the steps; needs a backbone of train_backbone.py --folds",
    ),
    click.option(
        "--keep-rps-permuted",
        is_flag=True,
        help="with --keep-rps: lists of another user (a control)",
    ),
)

# which candidates a prompt lists, in which order, and what is said of them
listing = (
    click.option(
        "--order",
        default="shuffled",
        type=click.Choice(["shuffled", "backbone"]),
        help="order of listed candidates: as stored, or the backbone's best first (easily copied)",
    ),
    click.option(
        "--orders",
        default=1,
        type=click.IntRange(1),
        help="from 2 on: shuffle listed candidates anew at every read of training, and score by "
        "the mean over so many orders (RecRanker's position shifting)",
    ),
    click.option(
        "--hint",
        default="none",
        type=click.Choice(["none", "backbone", "shuffled", "permuted"]),
        help="name the backbone's best five of the listed candidates in the prompt (RecRanker); "
        "shuffled: in any order; permuted: another user's, a control",
    ),
    click.option(
        "--pool",
        default="stored",
        type=click.Choice(["stored", "backbone"]),
        help="candidates of training prompts: the stored ones, or the backbone's best, the truth "
        "among them (LlamaRec, evaluate.py --two-stage)",
    ),
    click.option(
        "--draw",
        default="uniform",
        type=click.Choice(["uniform", "importance"]),
        help="training samples: all alike; importance: users by the log of their interactions "
        "(RecRanker)",
    ),
)
# items as vectors (LLaRA)
vectors = (
    click.option(
        "--curriculum",
        type=click.Choice(["sample", "batch", "off"]),
        help="with --input hybrid: vectors come with a probability that grows with the steps, "
        "drawn for a sample (the default), or for a batch, without which the map rests (LLaRA); "
        "off: always",
    ),
    click.option(
        "--permute-vectors",
        is_flag=True,
        help="with --input ids or hybrid: each item gets another's vector (the control)",
    ),
)
# long histories, told (LLM-TRSR)
summary = (
    click.option(
        "--summary",
        type=click.Choice(["words", "recurrent", "permuted-words", "permuted-recurrent", "empty"]),
        help="a summary of the --history (25 items) before its last 3 titles (LLM-TRSR). words: "
        "its heaviest TF-IDF words; recurrent: written by --llm, each once, when it is asked for. "
        "Controls: permuted-.., another user's; empty, none",
    ),
)
