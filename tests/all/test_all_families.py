"""Every score of all other language models that transformers knows, against plain transformers.

Some seven minutes on 2 cores: `pytest tests/all` runs it, `pytest tests` does not.
"""

import pytest
from families import RIGHT_OR_REFUSED, write
from plain import Reference, load_here, refusal_or_faults
from shrink import NAMED, TWICE, every_entry, family_of, not_built, other_families

SLOW_TO_FAIL = {
    ("decoder", "blt"),
    ("encoder-decoder", "vibevoice_asr"),
    ("encoder", "perceiver"),
    ("decoder", "glm_moe_dsa"),
}  # keys tie in some prompts only
IMPOSSIBLE = {entry for entry, reason in not_built().items() if reason != TWICE} - SLOW_TO_FAIL


@pytest.mark.parametrize("family", [*RIGHT_OR_REFUSED, *other_families()], ids=str)
def test_a_family_scores_as_plain_transformers_or_is_refused_in_a_sentence(family, toy, tmp_path):
    reference = Reference(family, write(family, tmp_path / "lm"), toy)
    for padded in (False, True)[: 2 if family.kind == "decoder" else 1]:
        outcome = refusal_or_faults(reference, padded)
        assert outcome == {} or (isinstance(outcome, str) and "\n" not in outcome)


def test_every_entry_of_transformers_tables_is_tested_or_has_a_reason():
    named = {(table, model_type) for table, types in NAMED.items() for model_type in types}
    tested = {tuple(family.name.split()) for family in other_families()}
    assert named | tested | set(not_built()) == set(every_entry())
    assert not named & set(not_built()) and all(not_built().values())


@pytest.mark.parametrize("table, model_type", sorted(IMPOSSIBLE))
def test_what_is_said_to_be_impossible_is(table, model_type, toy, tmp_path):
    family = family_of(table, model_type)
    with pytest.raises(Exception):  # noqa: B017 (once it can be made it shall be tested)
        reference = Reference(family, write(family, tmp_path / "lm"), toy)
        assert reference.plain.scale is not None
        reference.scores(load_here(reference.folder), False)
