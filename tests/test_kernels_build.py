"""The kernels are built once, done without where they cannot be, and compiled for GPUs."""

import os
import subprocess
import sys

import pytest
from kernel_cases import available

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


PROBE = """
import torch
from delrec.kernels import cpu, verbalizer as kernels
g = torch.Generator().manual_seed(0)
x, head = torch.randn(2, 5, generator=g), torch.randn(9, 5, generator=g)
tok, n = torch.randint(0, 9, (2, 3, 4), generator=g), torch.full((2, 3), 4)
for _ in range(2):
    scores = kernels.candidate_scores(x, head, tok, n)
    assert torch.equal(scores, kernels.candidate_scores(x, head, tok, n, impl="ref"))
assert cpu.library() is None
"""


@pytest.mark.parametrize(
    "env, says",
    [({"PATH": ""}, "no C++ compiler (g++) found"), ({"CXX": "false"}, "failed: no message")],
)
def test_without_a_compiler_torch_does_the_work_and_one_line_says_so(tmp_path, env, says):
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("kernels:") == 1 and says in done.stderr and "plain torch" in done.stderr
    )


def test_a_second_process_finds_the_library_built(tmp_path):
    available("cpp")
    script, made = "import delrec.kernels.cpu as c, sys; sys.exit(c.library() is None)", []
    for _ in range(2):
        assert (
            subprocess.run(
                [sys.executable, "-c", script],
                cwd=ROOT,
                env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            ).returncode
            == 0
        )
        files = list((tmp_path / "delrec" / "kernels").iterdir())
        made.append([(f.name, f.stat().st_mtime_ns) for f in files])
    assert made[0] == made[1] and len(made[0]) == 1 and files[0].suffix == ".so"


COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from delrec.kernels import gpu

SIZES = ("D", "stride_w", "stride_l", "n", "v0")  # multiples of 16, as pointers are

def build(kernel, sm, pointers, constants):
    names = kernel.arg_names
    kinds = {n: pointers.get(n, "i32") for n in names}
    signature = {n: "constexpr" if n in constants else kinds[n] for n in names}
    aligned = [
        i for i, n in enumerate(names)
        if n not in constants and (kinds[n].startswith("*") or n in SIZES)
    ]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": 4})

half = {"X": "*bf16", "W": "*bf16", "TOK": "*i32", "LEN": "*i32"}
half |= {"S": "*fp32", "G": "*fp32", "DX": "*fp32"}
runs = {"*fp32": ("L", "BIAS", "M", "S", "PICK", "SHRINK"), "*i32": ("TOK",), "*bf16": ("P",)}
absorb = {n: kind for kind, ns in runs.items() for n in ns}
top = {"L": "*fp32", "PTR": "*i64", "TOK": "*i32", "SEEN": "*i64", "KEYS": "*i64"}
blocks = {"BLOCK_T": 16, "BLOCK_D": 256}
tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
for sm in (86, 90):
    for kernel, pointers, constants, vector in (
        (gpu.scores_kernel, half, blocks, True),
        (gpu.scores_dx_kernel, half, blocks, True),
        (gpu.absorb_kernel, absorb, {"HAS_BIAS": True, "GRADIENT": True, "BLOCK": 2048}, True),
        (gpu.topk_kernel, top, {"BLOCK_I": 256, "BLOCK_B": 8, "K": 32}, False),
    ):
        built = build(kernel, sm, pointers, constants)
        ptx = built.asm["ptx"]
        assert f".target sm_{sm}" in ptx and len(built.asm["cubin"]) > 0, kernel
        assert not vector or "ld.global.v4" in ptx or "ld.global.v2" in ptx, kernel
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(built.asm["cubin"]), f.flush()
            command = [str(tool), "-res-usage", f.name]
            usage = subprocess.run(command, capture_output=True, text=True).stdout
        line = next(x for x in usage.splitlines() if "STACK" in x)
        assert "STACK:0" in line, (kernel, line)
        print(kernel.fn.__name__, sm, line.strip())
"""


def test_triton_kernels_compile_for_two_generations_of_gpus_without_one():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("STACK:0") == 8
