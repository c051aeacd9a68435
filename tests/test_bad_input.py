"""Bad input to every script: one clear sentence, an exit code that is not zero, nothing
half-written.
"""

import pytest
from bad_inputs import BAD_INPUTS, OWN, clear


@pytest.mark.parametrize("case", OWN)
def test_bad_input_is_one_sentence(case, tmp_path):
    assert clear(case, tmp_path)


def test_there_are_many_of_them():
    assert len(BAD_INPUTS) >= 60
