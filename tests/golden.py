"""Two revisions side by side: the same small inputs through both, and every difference named.

    python tests/golden.py REV            REV against the working tree; seven minutes on 2 cores
    python tests/golden.py REV --keep X   leaves the inputs and both trees' folders in X

For a refactoring: what a user types stays, and what a run writes stays bit for bit. Prepared data,
weights, scores, logs, tables, answers and what is printed are compared; the clock, memory, paths
and the commit are not. The last line says how many files are equal, or names the first difference
of each file that is not; the exit code is 1 then.
"""

import contextlib
import io
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from differences import compare

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# ---------------------------------------------------------------- what is run

TINY = "--verbalizer likelihood --max-title 16 --history 6"
STAGE_1 = (
    "--k 6 --a 3 --h 5 --candidates 8 --samples 24 --batch 8 --micro 4 --val-samples 12 --seed 0"
)
STAGE_2 = (
    "--samples 40 --batch 8 --micro 4 --val-samples 20 --init-r 6 --target-r 3 --lr .03 --seed 0"
)
IDS = "--input ids --history 8"
NET = "--epochs 3 --width 16 --batch 16 --history 8"


def distil(name, more, llm="llama"):
    """A line of stage 1."""
    options = f"--dataset {{D}} --llm {{I}}/{llm} --backbone {{R}}/sasrec {STAGE_1} {more}"
    return name, f"distill.py {options} --out {{R}}/{name}"


def tune(name, more, llm="llama"):
    """A line of stage 2."""
    options = f"--dataset {{D}} --llm {{I}}/{llm} --backbone {{R}}/sasrec {STAGE_2} {more}"
    return name, f"finetune.py {options} --out {{R}}/{name}"


def train(name, more):
    """A line of stage 0."""
    return name, f"train_backbone.py --dataset {{D}} {NET} {more} --out {{R}}/{name}"


def table(name, more):
    """A line of evaluate.py that writes a table."""
    return name, f"evaluate.py {more} --val-samples 20 --limit 40 --out {{R}}/{name}"


SHUFFLED = "--order shuffled"
LISTED = f"{SHUFFLED} --loss candidates"
LETTERS = "--verbalizer letter --order backbone"
SIGMOID = "--list-loss sigmoid"
COMMANDS = [
    ("prepare", "data/prepare.py toy --raw {I}/raw --out {D} --core 1 --noun movie --verb watched"),
    # stage 0
    train("sasrec", "--model sasrec"),
    train("gru4rec", "--model gru4rec"),
    train("caser", "--model caser"),
    train("sampled", "--loss sampled --negatives 16 --lists 100"),
    train("bce", "--loss bce --seed 1"),
    train("tfidf", "--teacher tfidf"),
    # stage 1
    distil("prompt", TINY),
    distil("prompt-show", "--verbalizer letter --show --balance uncertainty --tasks rps"),
    distil("prompt-t5", f"{TINY} --balance fixed --no-cache-prefix", "t5"),
    distil("prompt-bert", "--verbalizer mean --tasks ta --history 6", "bert"),
    distil("prompt-first", "--verbalizer first --history 6 --gradient-checkpointing"),
    distil("prompt-ids", IDS),
    distil("prompt-lora", f"{TINY} --lr-lm .001"),
    distil("prompt-paper", "--paper"),
    # stage 2
    tune("delrec", f"{TINY} --soft-prompt {{R}}/prompt --loss both --order shuffled"),
    tune("letters", f"{LETTERS} --soft-prompt {{R}}/prompt --history 6"),
    tune("t5-run", f"{TINY} --soft-prompt {{R}}/prompt-t5 {LISTED} --adapt linear", "t5"),
    tune("bert-run", f"--verbalizer mean --soft-prompt {{R}}/prompt-bert {LISTED}", "bert"),
    tune("paper", "--paper --soft-prompt {R}/prompt-paper"),
    tune("random", f"--verbalizer mean --soft-prompt random --k 4 {LISTED} --no-calibrate"),
    tune("words", f"{TINY} --soft-prompt words --loss titles {SHUFFLED} --gradient-checkpointing"),
    tune("ulsr", f"{TINY} --soft-prompt {{R}}/prompt {LISTED} --lr-prompt .01"),
    tune("ids", f"{IDS} --soft-prompt none"),
    tune("ids-prompt", f"{IDS} --soft-prompt {{R}}/prompt-ids"),
    tune("hybrid", f"--input hybrid {TINY} --soft-prompt none {LISTED}"),
    tune("student", "--soft-prompt none --input ids --teacher {R}/ids --layers 1 --lambda-ms 0"),
    tune("inner", f"{IDS} --soft-prompt none --blocks 2 --lambda-ms .1"),
    tune("pupil", "--teacher {R}/random --soft-prompt {R}/random --blocks 2 --lambda-ms .1"),
    # the circle
    ("export", "evaluate.py --ckpt {R}/delrec --export --export-k 5 --limit 200"),
    ("export-ids", "evaluate.py --ckpt {R}/ids --export --export-k 5"),
    train("taught", "--teacher {R}/ids --lam .5"),
    train("taught-caser", f"--model caser --teacher {{R}}/delrec --lam .1 {SIGMOID} --no-offset"),
    train("taught-gru", "--model gru4rec --teacher {R}/ids --lam .2 --confidence listed --eta 0"),
    # tables, answers, the probe
    table("table", "--ckpt {R}/sasrec {R}/gru4rec {R}/delrec {R}/ids --shuffle-history"
                   " --fuse delrec sasrec --report {R}/table/page.html"),
    table("table-3", "--ckpt {R}/caser {R}/t5-run {R}/bert-run {R}/hybrid {R}/letters {R}/student"),
    table("cold", "--ckpt {R}/sasrec {R}/delrec --max-history 13"),
    table("plain", "--ckpt {R}/sasrec --llm {I}/llama --llm-out {R}/llama --prompt-history 5"),
    ("answer", "evaluate.py --ckpt {R}/delrec --top 5 --history '{titles}'"),
    ("answer-net", "evaluate.py --ckpt {R}/sasrec --top 5 --history '{titles}'"),
    ("serve", "evaluate.py --ckpt {R}/ids --serve {I}/asked.jsonl --out {R}/said.jsonl --pool 0"),
    ("probe", "evaluate.py --ckpt {R}/prompt --probe --val-samples 12 --out {R}/probe"),
    ("probe-run", "evaluate.py --ckpt {R}/delrec --probe --val-samples 12 --out {R}/probe-run"),
]  # fmt: skip
# stopped in the middle by a signal, then resumed
GO_ON = "--checkpoint-every 1"
STOPPED = [
    train("sasrec-again", f"--model sasrec {GO_ON} --epochs 9"),
    distil("prompt-again", f"{TINY} {GO_ON} --samples 400"),
    tune(
        "delrec-again", f"{TINY} --soft-prompt {{R}}/prompt --order shuffled {GO_ON} --samples 400"
    ),
]
TWO = [
    distil("prompt-two", TINY),
    tune("delrec-two", f"{TINY} --soft-prompt {{R}}/prompt --loss both --order shuffled"),
    tune("ids-two", f"{IDS} --soft-prompt none"),
    table("table-two", "--ckpt {R}/sasrec {R}/delrec-two"),
]


# ---------------------------------------------------------------- the inputs, made once


def make_inputs(folder):
    """A log of 60 users, tiny random LMs of three kinds, histories to answer."""
    sys.path[:0] = [str(HERE), str(ROOT)]
    import numpy as np
    from families import EXACT, write
    from toys import title_of

    rng, rows, seen = np.random.default_rng(0), [], set()
    weight = 1 / np.arange(3, 63)
    for user in range(60):
        items = rng.choice(60, 14, replace=False, p=weight / weight.sum()) + 1
        times = np.sort(rng.choice(1000, 14, replace=False))
        rows += [f"{user},{i},{t}" for i, t in zip(items, times)]
        seen |= set(items.tolist())
    rows += [f"60,{i},{i}" for i in range(1, 61) if i not in seen]
    raw = folder / "raw"
    raw.mkdir()
    (raw / "interactions.csv").write_text("\n".join(["user,item,timestamp", *rows, ""]))
    titles = [f'{i},"{title_of(i)}"' for i in range(1, 61)]
    (raw / "items.csv").write_text("\n".join(["item,title", *titles, ""]))
    for name, family in (("llama", "llama"), ("t5", "t5-v1.1"), ("bert", "bert")):
        write(next(f for f in EXACT if f.name == family), folder / name)
    asked = [[title_of(i) for i in rng.choice(60, n, replace=False) + 1] for n in (1, 3, 9)]
    lines = [json.dumps({"history": titles}) for titles in asked]
    (folder / "asked.jsonl").write_text("\n".join([*lines, ""]))
    return " | ".join(asked[1]).replace("'", "")


# ---------------------------------------------------------------- one tree


def run_all(tree, inputs, out, titles):
    """Runs everything in `tree`, what is printed in out/said/."""
    (out / "said").mkdir(parents=True)
    names = {"I": inputs, "D": out / "toy", "R": out / "runs", "titles": titles}
    sys.path.insert(0, str(tree))
    for name, line in COMMANDS:
        began, said = time.time(), io.StringIO()
        script, *args = shlex.split(line.format(**names))
        with contextlib.redirect_stdout(said):
            code = in_this_process(tree / script, args)
        (out / "said" / f"{name}.txt").write_text(said.getvalue())
        print(f"{name}: {time.time() - began:.1f} s", flush=True)
        if code:
            sys.exit(
                f"{name} ended with {code} in {tree}: {line.format(**names)}\n{said.getvalue()}"
            )
    for name, line in STOPPED:
        stop_and_resume(tree, shlex.split(line.format(**names)), out / "runs" / name)
        print(f"{name}: stopped and resumed", flush=True)
    for name, line in TWO:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", port]
        said = launched(tree, [*launch, *shlex.split(line.format(**names))])
        (out / "said" / f"{name}.txt").write_text(said)
        print(f"{name}: by two processes", flush=True)


def in_this_process(script, args) -> int:
    """Runs a script as `python script args` would, without starting Python anew; its exit code."""
    import torch

    sys.argv = [str(script), *args]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    torch.manual_seed(1)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        signal.signal(signal.SIGTERM, handlers[0])
        signal.signal(signal.SIGINT, handlers[1])
    return 0


def launched(tree, args) -> str:
    """What a new Python process prints; its failure ends this one."""
    done = subprocess.run([sys.executable, *args], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(args)} failed in {tree}:\n{done.stdout}{done.stderr}")
    return done.stdout


def stop_and_resume(tree, args, folder):
    """Runs a stage, stops it by a signal after its second logged step, and resumes it."""
    process = subprocess.Popen(
        [sys.executable, *args], cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    log = folder.with_name(f"{folder.name}.unfinished") / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    if (folder / "config.json").exists():
        sys.exit(f"{folder.name} was finished before it could be stopped: give it more steps")
    launched(tree, [*args, "--resume"])


# ---------------------------------------------------------------- both


def start(tree, room, side, titles):
    """A process that runs everything in `tree`."""
    more = {"XDG_CACHE_HOME": str(room / side / "cache"), "OMP_NUM_THREADS": "1"}
    more |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    args = [str(HERE / "golden.py"), "--run", str(tree), str(room / "in"), str(room / side), titles]
    said = open(room / f"{side}.log", "w")  # noqa: SIM115
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *args],
        cwd=tree,
        env=os.environ | more,
        stdout=said,
        stderr=subprocess.STDOUT,
    )


def copy_of_working_tree(folder):
    """The working tree as it is now, so that it may be worked on meanwhile."""
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def main(rev, room):
    """Both trees at once, one core each; then every file of both."""
    tree = room / "tree"
    subprocess.run(
        ["git", "worktree", "add", "-f", "--detach", str(tree), rev], cwd=ROOT, check=True
    )
    try:
        (room / "in").mkdir()
        titles = make_inputs(room / "in")
        mine = copy_of_working_tree(room / "mine")
        running = [start(tree, room, "there", titles), start(mine, room, "here", titles)]
        codes = [process.wait() for process in running]
        for side, code in zip(("there", "here"), codes):
            if code:
                sys.exit((room / f"{side}.log").read_text()[-3000:])
        places = [room / "there", room / "here", tree, mine]
        found = compare(room / "there", room / "here", places)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=False)
    for name, difference in found:
        print(f"{name}: {difference}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        tree, inputs, out = map(Path, sys.argv[2:5])
        run_all(tree, inputs, out, sys.argv[5])
    elif len(sys.argv) == 4 and sys.argv[2] == "--keep":
        Path(sys.argv[3]).mkdir(parents=True)
        main(sys.argv[1], Path(sys.argv[3]).resolve())
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        with tempfile.TemporaryDirectory() as room:
            main(sys.argv[1], Path(room))
    else:
        sys.exit(__doc__)
