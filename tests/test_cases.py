"""delrec/evaluation/cases.py: the case study of a page."""

import numpy as np
from toys import prepare_log

from delrec.evaluation.cases import cases_of
from delrec.evaluation.scores import part_of


def test_twin_titles_are_told_apart_by_their_ids(tmp_path):
    rows = [(u, f"a{(u * 7 + n) % 30:02d}", 10 * n + u) for u in range(20) for n in range(12)]
    data = prepare_log(tmp_path, rows, {f"a{i:02d}": f"Title {i // 2}" for i in range(30)})
    test = part_of(data, "test", np.arange(8), 15)
    value = {"run": {"rank": np.ones(8)}}
    for case in cases_of(data, test, {"run": test.is_target_nC.astype(float)}, value, n=8):
        said = [title for title, _ in case.answers["run"]]
        assert len(set(said)) == len(said) and said[0] == case.truth
        assert all(" [id a" in title for title in [*said, *case.history])
