"""checkpoints.py: a stopped run that goes on is bit for bit the run that was never stopped; damage,
full disks, refusals; exploding numbers.
"""

import errno
import json
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from lm_cases import wrong_by
from stopped_runs import different, dying, kept_in, run, same, stop_and_resume, stopped, weights

import finetune
from delrec.lm import check, passes
from delrec.processes import sum_gradients
from delrec.runtime import read_json
from delrec.training import checkpoints


@pytest.mark.parametrize(
    "name, steps", [("train_backbone", (3, 10)), ("distill", (1, 3)), ("finetune", (2, 4, 6))]
)
def test_a_stopped_run_that_goes_on_is_the_run_that_was_never_stopped(
    jobs, whole, tmp_path, monkeypatch, name, steps
):
    want = whole(name)
    for n in steps:
        assert same(stop_and_resume(jobs, name, tmp_path, monkeypatch, n), want), n


@pytest.mark.parametrize("name", ["train_backbone", "distill", "finetune"])
def test_a_resumed_run_counts_the_time_before_it_was_stopped(jobs, tmp_path, monkeypatch, name):
    load = checkpoints.Saver.load

    def load_of_long_ago(self):
        step, tensors, state = load(self)
        return step, tensors, state | {"seconds": 1e4}

    monkeypatch.setattr(checkpoints.Saver, "load", load_of_long_ago)
    out = stop_and_resume(jobs, name, tmp_path, monkeypatch, 3)
    assert read_json(out / "config.json")["seconds"] > 1e4


def zero(prefix):
    def spoil(tensors):
        keys = [k for k in tensors if k.startswith(prefix)]
        assert keys
        for k in keys:
            tensors[k] = torch.zeros_like(tensors[k])

    return spoil


@pytest.mark.parametrize(
    "name, after, spoil",
    [
        ("train_backbone", 3, zero("opt.")),
        ("train_backbone", 3, zero("best.weights.")),
        ("train_backbone", 3, lambda _: torch.manual_seed(5)),
        ("distill", 2, zero("lion.")),
        ("distill", 2, zero("param.")),
        ("finetune", 2, zero("lion.")),
        ("finetune", 2, zero("adalora.exp_avg_ipt/")),
        ("finetune", 2, zero("adalora.exp_avg_unc/")),
        ("finetune", 2, zero("param.")),
    ],
)
def test_the_test_would_fail_without_one_of_them(
    jobs, whole, tmp_path, monkeypatch, name, after, spoil
):
    try:
        assert not same(
            stop_and_resume(jobs, name, tmp_path, monkeypatch, after, spoil), whole(name)
        )
    except AssertionError as e:
        # without its importances the allocator misses its budget: that too is a difference
        if "AdaLoRA kept rank" not in str(e):
            raise


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(
    jobs, whole, tmp_path, monkeypatch
):
    main, args = jobs["distill"]
    want = whole("distill")
    for damage in (
        lambda p: p.write_bytes(p.read_bytes()[:-3]),
        lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
        lambda p: p.unlink(),
    ):  # cut short, one bit changed, gone
        for part in ("tensors.safetensors", "state.json"):
            kept = stopped(jobs, "distill", tmp_path / "run", monkeypatch)
            assert [step for step, _ in kept] == [2, 3]
            damage(kept[-1][1] / part)
            said = run(main, args(tmp_path / "run", "--resume"))
            assert "step-000003 is damaged" in said
            assert "continuing from step 2" in said
            assert same(tmp_path / "run", want)


@pytest.mark.parametrize(
    "module, function",
    [
        (checkpoints, "write_tensors"),
        (checkpoints.os, "fsync"),
        (checkpoints.os, "replace"),
        (checkpoints.hashlib, "file_digest"),
    ],
    ids=["write_tensors", "fsync", "replace", "file_digest"],
)
def test_a_save_that_breaks_off_anywhere_leaves_the_older_checkpoints(
    jobs, whole, tmp_path, monkeypatch, module, function
):
    main, args = jobs["distill"]
    kept = stopped(jobs, "distill", tmp_path / "run", monkeypatch)

    def full(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        write = checkpoints.Saver.write

        def write_on_a_full_disk(self, *a):
            patch.setattr(module, function, full)
            write(self, *a)

        patch.setattr(checkpoints.Saver, "write", write_on_a_full_disk)
        # from the beginning, so that a save comes at once
        patch.setattr(checkpoints.Saver, "load", lambda self: None)
        said = run(main, args(tmp_path / "run", "--resume"), 1)
    assert "could not be written" in said and "No space left" in said, said
    assert "that of step 3 is whole" in said and said.count("Error") == 1, said
    left = checkpoints.complete(kept_in(tmp_path / "run"))
    assert [path for _, path in left] == [path for _, path in kept]
    assert "continuing from step 3" in run(main, args(tmp_path / "run", "--resume"))
    # the log of steps 2 and 3 is gone
    assert not different(weights(tmp_path / "run")[0], weights(whole("distill"))[0])


@pytest.mark.parametrize(
    "more, says",
    [
        (["--lr", 0.123], "lr was"),
        (["--seed", 5], "seed was"),
        (["--samples", 8], "samples was"),
        (["--h", 2], "h was"),
    ],
)
def test_flags_that_shape_the_answer_cannot_change(jobs, tmp_path, monkeypatch, more, says):
    main, args = jobs["distill"]
    kept = stopped(jobs, "distill", tmp_path / "run", monkeypatch)
    said = run(main, args(tmp_path / "run", "--resume", *more), 1)
    assert says in said
    assert "cannot resume" in said
    assert checkpoints.complete(kept_in(tmp_path / "run")) == kept


def test_another_lm_data_set_or_number_of_processes_cannot_go_on(jobs, tmp_path, monkeypatch):
    kept = stopped(jobs, "distill", tmp_path / "run", monkeypatch)
    meta = json.loads((kept[-1][1] / "meta.json").read_text())
    assert meta["made_with"]["prompt_words"] == {"noun": "movie", "verb": "watched"}
    others = dict.fromkeys(("data_hash", "lm", "prompt_words", "wording"), "0") | {"processes": 2}
    for key, value in others.items():
        (kept[-1][1] / "meta.json").write_text(
            json.dumps(meta | {"made_with": meta["made_with"] | {key: value}})
        )
        main, args = jobs["distill"]
        assert f"{key.replace('_', '-')} was {value}, now it is" in run(
            main, args(tmp_path / "run", "--resume"), 1
        )


def test_a_checkpoint_of_an_earlier_version_is_a_sentence(jobs, tmp_path, monkeypatch):
    main, args = jobs["distill"]
    path = stopped(jobs, "distill", tmp_path / "run", monkeypatch)[-1][1] / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in meta.items() if k != "form"}))
    said = run(main, args(tmp_path / "run", "--resume"), 1)
    assert "was written by an earlier version" in said and "--overwrite" in said


def test_flags_that_do_not_shape_it_may_change(jobs, whole, tmp_path, monkeypatch):
    main, args = jobs["distill"]
    stopped(jobs, "distill", tmp_path / "run", monkeypatch)
    more = ["--micro", 2, "--gradient-checkpointing", "--checkpoint-every", 3]
    run(main, args(tmp_path / "run", "--resume", *more))
    (tensors, _), (others, _) = weights(tmp_path / "run"), weights(whole("distill"))
    for k, t in tensors.items():
        torch.testing.assert_close(t, others[k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["distill", "finetune"])
def test_an_lm_is_not_read_in_another_way_than_before(jobs, tmp_path, monkeypatch, name):
    main, args = jobs[name]
    stopped(jobs, name, tmp_path / "run", monkeypatch, 2)
    with monkeypatch.context() as patch:  # taken on trust, it is read as was found
        patch.setattr(checkpoints, "stop_asked", lambda ranks: True)
        again = args(tmp_path / "run", "--resume", "--no-check-llm")
        assert "continuing from step 2" in run(main, again, checkpoints.STOPPED)
    monkeypatch.setattr(check, "CACHE", tmp_path / "another")
    monkeypatch.setattr(passes, "can_fuse", lambda lm: False)
    monkeypatch.setattr(passes, "pass_packed", wrong_by(0.01))
    stopped(jobs, name, tmp_path / "run", monkeypatch)
    said = run(main, args(tmp_path / "run", "--resume", "--no-check-llm"), 1)
    assert "(--check-llm) was padded, our attention, now it is the fastest, our attention" in said
    assert "continuing from step 3" in run(main, args(tmp_path / "run", "--resume"))


def test_what_draws_other_dropout_may_change_only_where_there_is_none(jobs, tmp_path, monkeypatch):
    main, args = jobs["finetune"]
    for dropout in (0.1, 0):

        def args_for(out, *more, dropout=dropout):
            return args(out, "--dropout", dropout, *more)

        out = tmp_path / f"{dropout}"
        stopped({"it": (main, args_for)}, "it", out, monkeypatch)
        changed = {"micro was 4, now it is 2": ["--micro", 2]}
        changed["cache-prefix was True, now it is False"] = ["--no-cache-prefix"]
        for says, more in changed.items() if dropout else []:
            assert says in run(main, args_for(out, "--resume", *more), 1)
        more = [] if dropout else sum(changed.values(), [])
        assert "continuing from step 3" in run(main, args_for(out, "--resume", *more))


def test_resuming_nothing_begins_and_resuming_a_finished_run_ends(jobs, whole, tmp_path):
    main, args = jobs["distill"]
    assert "no checkpoint" in run(main, args(tmp_path / "new", "--resume"))
    assert same(tmp_path / "new", whole("distill"))
    before = (tmp_path / "new" / "config.json").read_bytes()
    assert "is finished" in run(main, args(tmp_path / "new", "--resume"))
    assert (tmp_path / "new" / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["train_backbone", "distill", "finetune"])
def test_numbers_that_explode_stop_before_the_update(jobs, tmp_path, monkeypatch, name):
    main, args = jobs[name]
    kept = stopped(jobs, name, tmp_path / "run", monkeypatch)
    module = sys.modules[main.callback.__module__]
    source = sum_gradients if name == "train_backbone" else module.sum_gradients

    def explode(params, ranks):
        source(params, ranks)
        params[0].grad.view(-1)[3] = torch.nan

    monkeypatch.setattr(module, "sum_gradients", explode)
    said = run(main, args(tmp_path / "run", "--resume"), 1)
    assert "1 of " in said, said
    assert "gradients are not finite" in said, said
    assert "step 4" in said, said
    assert "samples " in said, said
    assert checkpoints.complete(kept_in(tmp_path / "run")) == kept


def test_an_adapter_that_did_not_move_is_an_error(jobs, tmp_path, monkeypatch):
    main, args = jobs["finetune"]
    monkeypatch.setattr(finetune.Lion, "step", lambda self: None)
    monkeypatch.setattr(
        "peft.tuners.adalora.layer.RankAllocator.mask_to_budget",
        lambda self, model, budget: {
            n: [True] * 3 + [False] * 3 for n, p in model.named_parameters() if "lora_E" in n
        },
    )
    said = run(main, args(tmp_path / "run"), 1)
    assert "did not move" in said or "AdaLoRA kept rank" in said
    assert not (tmp_path / "run" / "config.json").exists()


# ---------------------------------------------------------------- real processes


def test_the_generator_of_a_gpu_goes_on_too(tmp_path, monkeypatch):
    """Dropout there is drawn by it. Another generator stands in for it where there is no GPU."""
    gpu = SimpleNamespace(rank=0, world=1, main=True, device=torch.device("cuda", 0))
    if there := torch.cuda.is_available():
        card = torch.cuda.default_generators[0]
    else:
        card = torch.Generator()
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: card.get_state())
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, device: card.set_state(s))

    def drawn():
        return torch.rand(4, generator=card, device=gpu.device if there else "cpu").tolist()

    saver = checkpoints.Saver(tmp_path, 1, {}, gpu)
    drawn()
    saver.save(1, {}, {})
    want = drawn()
    assert drawn() != want
    saver.load()
    assert drawn() == want


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_ended_goes_on(jobs, whole, start, tmp_path, number):
    _, args = jobs["distill"]
    process = start("distill", args(tmp_path / "run"))
    until = time.time() + 300
    kept = kept_in(tmp_path / "run")
    while not checkpoints.complete(kept) and process.poll() is None and time.time() < until:
        time.sleep(0.005)
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    ended = process.returncode
    if ended == 0:
        pytest.skip("the run was over before the signal came")
    assert ended == (-9 if number == signal.SIGKILL else checkpoints.STOPPED), said
    assert ("asked to stop: the step is finished" in said) == (number != signal.SIGKILL)
    process = start("distill", args(tmp_path / "run", "--resume"))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "continuing from step" in said, said
    torch.set_num_threads(1)
    assert same(tmp_path / "run", whole("distill"))


@pytest.mark.long
def test_a_process_that_dies_is_started_again_and_the_run_goes_on(jobs, tmp_path):
    main, args = jobs["train_backbone"]
    # a process draws its own dropout: without it two give what one gives
    done = dying(args(tmp_path / "two", "--dropout", 0))
    assert done.returncode == 0 and "continuing from step" in done.said, done.said
    run(main, args(tmp_path / "one", "--dropout", 0))
    (tensors, log), (others, other_log) = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert [line["step"] for line in log] == [line["step"] for line in other_log]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (log, other_log)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
    for k, t in tensors.items():
        torch.testing.assert_close(t, others[k], rtol=1e-3, atol=1e-4)
