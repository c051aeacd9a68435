"""make demo: ML-100K and a real LLM through all stages on this machine, then the table.

    python demo.py            about 15 minutes on 2 cores; every stage is one of the commands of the README, with fewer samples

The last line is one JSON object with the demo's minutes, its peak memory and the table's rows.
"""
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import click

from delrec.runtime import described

ROOT = Path(__file__).resolve().parent
TEST_SAMPLES = 300
STAGES = [
    "data/prepare.py ml-100k",
    "data/prepare.py smollm2-135m",
    "train_backbone.py --dataset ml-100k",
    "distill.py --dataset ml-100k --samples 64 --val-samples 48 --evals 1",
    "finetune.py --dataset ml-100k --samples 192 --val-samples 100 --evals 1",
    f"evaluate.py --llm smollm2-135m --ckpt ml-100k/sasrec ml-100k/delrec --dataset ml-100k --limit {TEST_SAMPLES} --val-samples 100",
]


@click.command(**described(__doc__))
def main():
    """Every stage of the README on ML-100K, small, and the table."""
    began, minutes = time.time(), []
    for stage in STAGES:
        print(f"\n=== python {stage}", flush=True)
        start, last = time.time(), ""
        process = subprocess.Popen([sys.executable, "-u", *stage.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
        if process.wait():
            sys.exit(f"demo: '{stage.split()[0]}' stopped with exit code {process.returncode}; its message is above")
        minutes.append((time.time() - start) / 60)
    result = json.loads(last)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2 ** 20 if sys.platform != "darwin" else 2 ** 30)
    print("\nminutes: " + ", ".join(f"{s.split()[0]} {m:.1f}" for s, m in zip(STAGES, minutes)))
    result["rows"] = [{"name": "demo.minutes", "value": round((time.time() - began) / 60, 2), "unit": "min", "goal": 15},
                      {"name": "demo.peak_gb", "value": round(peak, 2), "unit": "GB", "goal": 8}, *result["rows"]]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
