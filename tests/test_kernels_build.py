"""The kernels are built once, done without where they cannot be, and compiled for GPUs."""

import json
import os
import subprocess
import sys

import pytest
from kernel_cases import available

from delrec.kernels.compiled import (
    CARDS,
    Usage,
    barriers_in_loops,
    blocks_held,
    instructions,
    most_asked,
)

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
import json
from delrec.kernels.compiled import CARDS, rows_of
print(json.dumps([row for card in CARDS for row in rows_of(card, "bf16", (1,))]))
"""


def without_interpreter(command):
    """What a process says in which Triton compiles kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_triton_kernels_compile_without_spills_for_four_generations_of_gpus():
    pytest.importorskip("triton")
    rows = json.loads(without_interpreter([sys.executable, "-c", COMPILE]))
    assert {row["sm"] for row in rows} == {80, 86, 89, 90} and len(rows) == 4 * 5
    for row in rows:
        assert row["stack"] == [0] and row["wide"][0] > 0 and row["asked"][0] >= 32, row
    waits = {row["kernel"]: row["barriers"] for row in rows if row["sm"] == 80}
    assert waits["scores, backward"] == waits["likelihood"] == [0]
    # 20 candidates, one program each, of 16 warps for so few: one block an SM of 108
    first = rows[0]
    assert (first["card"], first["blocks"], first["warps"]) == ("A100", [20], [16])
    assert first["waves"] == [round(20 / 108, 3)]


def test_blocks_an_sm_holds_by_hand():
    a100, rtx3090, *_ = CARDS
    usage = Usage(registers=90, stack=0, shared=0, warps=4, loads=0, wide=0, barriers=0, asked=0)
    # 90 registers x 32 = 2,880 are given as 3,072: 5 warps in each of an SM's four parts
    assert blocks_held(a100, usage) == 5
    # 48 KB and the block's own 1 KB: three times in 164 KB, twice in 100
    large = usage._replace(registers=16, shared=48 * 1024)
    assert (blocks_held(a100, large), blocks_held(rtx3090, large)) == (3, 2)
    # few registers: 32 blocks at most, or 64 warps; on the other card 16, or 48 warps
    small = usage._replace(registers=16, warps=1)
    assert (blocks_held(a100, small), blocks_held(rtx3090, small)) == (32, 16)
    assert blocks_held(rtx3090, small._replace(warps=4)) == 12


LISTING = """
/*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
/*0010*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
/*0020*/                   FADD R4, R4, R8 ;
/*0030*/                   LDG.E R12, desc[UR4][R2.64] ;
/*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
/*0050*/               @P1 BRA 0x30 ;
/*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
"""


def test_bytes_asked_for_and_barriers_in_loops_are_read_from_a_listing():
    code = instructions(LISTING)
    assert [name for _, name, _ in code][:2] == ["LDG.E.128", "LDG.E.128"] and len(code) == 7
    # two loads of 16 bytes, then both are needed; the barrier behind the loop does not count
    assert most_asked(code) == 32 and barriers_in_loops(code) == 1


def test_where_triton_interprets_the_table_is_refused_in_one_sentence():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "kernels/compiled.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "env -u TRITON_INTERPRET python kernels" in done.stderr
    assert "Traceback" not in done.stderr
