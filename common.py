"""What the four scripts share: starting and finishing a run, the forecast, the look at gradients before they are used."""
import shutil
import time

import numpy as np
import torch

from delrec.processes import finish
from delrec.runtime import commit, machine, stop, versions, write_json
from delrec.training.memory import peak_gb, total_bytes


def forecast(step_seconds, steps, validation_seconds, validations, ranks):
    """One line after the first measured steps: the time and the memory that the run will take."""
    if not ranks.main:
        return
    left = np.median(step_seconds) * (steps - len(step_seconds)) + validation_seconds * validations
    gpu, total = ranks.device.type == "cuda", total_bytes(ranks.device)
    used = torch.cuda.max_memory_allocated() / 2 ** 30 if gpu else peak_gb()
    print(f"{len(step_seconds)} steps took {np.median(step_seconds):.2f} s each: about {left / 60:.1f} minutes to go for {steps - len(step_seconds)} steps and {validations} "
          f"validations; {used:.1f} GB of {'the GPU' if gpu else 'memory'} at the peak so far" + (f", it has {total / 2 ** 30:.0f}" if total else ""), flush=True)


def start_run(out, stage, cfg, data, ranks):
    """Make the run folder and take away its completion mark and what an earlier run left. Returns the record that finish_run writes to
    config.json. With cfg.resume a finished run ends here, and log and checkpoints stay."""
    resume = getattr(cfg, "resume", False)
    if resume and (out / "config.json").exists():
        if ranks.main:
            print(f"{out} is finished, there is nothing to resume; run without --resume to do it again", flush=True)
        finish(ranks)
        raise SystemExit(0)
    if ranks.main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)
        if not resume:                                   # no weights, scores or ranks of an earlier run may pass for this one's
            for old in (p for name in ("log.jsonl", "metrics.json", "neutral.npy", "*.safetensors", "scores_*.npy", "full_*.npy", "ranks_*.npy", "topk_*.npy", "probe.*") for p in out.glob(name)):
                old.unlink()
            for old in ("checkpoints", "adapter", "lm", "evaluation"):
                shutil.rmtree(out / old, ignore_errors=True)
        print(f"{stage}: " + " ".join(f"{k}={v}" for k, v in vars(cfg).items() if v is not None), flush=True)
    return {"stage": stage, **vars(cfg), "dataset": data.name, "data_folder": str(data.folder), "data_hash": data.meta["hash"],
            "world": ranks.world, "versions": versions(), "commit": commit(), "machine": machine(), "started": time.time()}


def finish_run(out, record):
    """config.json is written last: a run folder with it is complete."""
    record["seconds"] = round(time.time() - record.pop("started"), 1)
    record["peak_gb"] = round(peak_gb(), 2)
    write_json(out / "config.json", record)
    return record


def stop_unless_finite(params, step, samples, data, losses=0.0):
    """Ends the run, before anything is updated, if a gradient (or a loss) is not finite. Both are sums over all processes, so all end."""
    grads = torch.stack(torch._foreach_norm([p.grad for p in params if p.grad is not None]))
    if not np.isfinite(losses).all() or not torch.isfinite(grads).all():
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        stop(f"step {step}: {int((~torch.isfinite(grads)).sum())} of {len(grads)} gradients are not finite" + (f", the loss is {losses}" if losses else "") + f" (samples {shown} of {data.name}); nothing was "
             "updated and the last checkpoint is good; lower --lr and run again, or look at those samples")
