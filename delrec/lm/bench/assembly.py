"""What forming a prompt costs on one core: from items to the arrays that a pass of the LM takes.

python -m delrec.lm.bench --assembly    a minute
"""

import time
from collections.abc import Callable

import numpy as np

from delrec.data.prepared import Data, candidates, histories
from delrec.kernels.bench import Row
from delrec.lm.bench.work import C, settings_of
from delrec.lm.model import LM
from delrec.lm.prompts import Prompts
from delrec.lm.ragged import Ragged, of_padded
from delrec.lm.reading import Start, rows_of_prompts
from delrec.lm.titles import tokenise_titles

B = 256  # prompts of a batch
REPEATS = 50


def assembly(rows: list[Row], lm: LM, data: Data) -> None:
    """Adds rows of microseconds a prompt: 10 titles and 15 listed candidates, and 20 vectors."""
    titles = tokenise_titles(lm, data)
    for shown, L, show, goal in (("titles", 10, True, 25), ("ids", 20, False, 5)):
        prompts = Prompts(lm, data, titles, settings_of("mean", show, L), shown=shown)
        old_BL, cand_BC = samples_of(data, L)

        def formed(prompts=prompts, old_BL=old_BL, cand_BC=cand_BC):
            return prompts.histories(of_padded(old_BL), cand_BC)[0]

        def arrays(prompts=prompts, formed=formed):
            return arrays_of(prompts, formed())

        name = "assemble.vectors" if shown == "ids" else "assemble.titles"
        rows.append(Row(f"{name}.us", microseconds(arrays), "us", goal))
        rows.append(Row(f"{name}.prompts_alone.us", microseconds(formed), "us"))
        rows.append(Row(f"{name}.tokens", len(formed().flat) / B, "tokens"))


def samples_of(data: Data, L: int) -> tuple[np.ndarray, np.ndarray]:
    """Histories (B, L) and candidates (B, C) of the test part, some of them several times."""
    which = np.resize(np.random.default_rng(0).permutation(len(data.test))[:B], B)
    return histories(data, data.test[which], L), candidates(data, "test", C)[which]


def arrays_of(prompts: Prompts, tails: Ragged) -> list[np.ndarray]:
    """Tokens, segments and places (B, Q) of prompts behind a kept prefix, as pass_padded makes
    them."""
    return rows_of_prompts(Start(prompts.prefix, None, [()]), tails, None, None).padded()


def microseconds(form: Callable) -> float:
    """Microseconds of CPU time a prompt takes: the least of some batches."""
    spent = []
    for _ in range(REPEATS):
        began = time.process_time()
        form()
        spent.append(time.process_time() - began)
    return min(spent) * 1e6 / B
