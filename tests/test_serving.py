"""delrec/serving: answers carry ids, a bad line is its own affair, and nothing loses an answer.

The run is a rule: the higher an item's number, the better.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import click
import pytest
from recommenders import RULE, by_number, recommender_of
from scripts import ROOT, sentence
from toys import prepare_log

import evaluate
from delrec.serving.answerer import Answerer
from delrec.serving.answers import answer_file, answer_history
from delrec.serving.catalogue import Catalogue
from delrec.serving.output import AnswerFile, json_line

NAMES = {5: "Mug | blue", 6: "Тёплый чай 🍵", 7: "Twin", 8: "Twin"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """40 articles with ids a01 .. a40; item i is a<i>."""
    rows = [(u, f"a{(u * 7 + n) % 40 + 1:02d}", 10 * n + u) for u in range(20) for n in range(12)]
    titles = {f"a{i:02d}": NAMES.get(i, f"Article {i}") for i in range(1, 41)}
    return prepare_log(tmp_path_factory.mktemp("shop"), rows, titles)


@pytest.fixture
def ask(shop, alone, capsys):
    """ask(history, top) -> (what is printed, the object of its last line)."""

    def asked(history, top=2):
        answer_history(recommender_of(shop).now, alone, {"top": top}, history=history)
        said = capsys.readouterr().out
        return said, json.loads(said.splitlines()[-1])

    return asked


@pytest.fixture
def serve(shop, alone, tmp_path):
    """serve(lines, out) -> the answers to a file of those lines (bytes, texts or objects)."""

    def served(*lines, out=None):
        texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
        text = b"\n".join(t.encode() if isinstance(t, str) else t for t in texts)
        (tmp_path / "ask.jsonl").write_bytes(text)
        answer_file(recommender_of(shop).now, alone, {"top": 2}, tmp_path / "ask.jsonl", out)
        return answers(out or tmp_path / "ask.answers.jsonl")

    return served


def answers(path):
    return [json.loads(line) for line in Path(path).read_bytes().decode().split("\n") if line]


# ---------------------------------------------------------------- ids


def test_answers_carry_raw_ids_in_json_and_in_print(ask):
    said, answer = ask("a03 | Article 39")
    assert answer["history_ids"] == ["a03", "a39"]
    assert [(t["id"], t["title"]) for t in answer["top"]] == [
        ("a40", "Article 40"),
        ("a38", "Article 38"),
    ]
    assert "\n  1. Article 40   40.000   id a40\n" in said
    assert "history: Article 3 | Article 39\nits ids: a03 | a39\n" in said


def test_the_ids_of_an_answer_ask_the_same_again(ask):
    first = ask("Article 3 | Twin")[1]
    again = ask(" | ".join(first["history_ids"]))[1]
    assert again["top"] == first["top"] and again["history"] == first["history"]
    assert ask(first["top"])[1]["history"] == [40, 39]  # what was answered can be asked as it is


def test_twin_titles_are_said_and_an_id_tells_them_apart(ask):
    said, answer = ask("twin")
    assert answer["history_ids"] == ["a07"]
    assert "note: 'twin' is the title of 2 items (ids a07, a08); a07 was taken" in said
    said, answer = ask(["a08"])
    assert answer["history_ids"] == ["a08"] and not answer["remarks"] and "note:" not in said


def test_a_title_with_the_separator_is_given_as_text_as_json_or_by_its_id(ask, shop, script):
    for history in ("Mug | blue | Article 1", ["Mug | blue", "Article 1"], "a05 | a01"):
        assert ask(history)[1]["history"] == [5, 1]
    assert ask([{"id": "a05"}, {"title": "Article 1"}])[1]["history"] == [5, 1]


def test_history_json_is_a_flag_of_evaluate(sasrec, toy, script, on_cpu):
    given = json.dumps([toy.titles[12], 3, {"id": "40"}])
    result = script(evaluate.main, "--ckpt", sasrec, "--history-json", given)
    assert result.json["history"] == [12, 3, 40]
    same = " | ".join([toy.titles[12], "3", "40"])
    assert (
        script(evaluate.main, "--ckpt", sasrec, "--history", same).json["top"]
        == (result.json["top"])
    )
    says = script(evaluate.main, "--ckpt", sasrec, "--history-json", "[", code=1).error
    assert "--history-json is no JSON" in says
    assert (
        "holds no list"
        in script(evaluate.main, "--ckpt", sasrec, "--history-json", '"a"', code=1).error
    )
    assert (
        "expected titles or ids"
        in script(evaluate.main, "--ckpt", sasrec, "--history-json", "[1.5]", code=1).error
    )
    both = ["--history", "a", "--history-json", "[]"]
    says = script(evaluate.main, "--ckpt", sasrec, *both, code=1).error
    assert "--history and --history-json were given" in says


# ---------------------------------------------------------------- lines


BAD = {
    "no JSON": ("{", "is no JSON object"),
    "no object": ('["Article 1"]', "is no JSON object"),
    "not UTF-8": (b'{"history": ["caf\xe9"]}', "byte 0xe9 is not UTF-8"),
    "no history": ({"user": 7}, 'it holds no "history"'),
    "a number for a history": ({"user": 7, "history": 3}, "the history is 3"),
    "nothing for a title": ({"user": 7, "history": ["Article 1", None]}, "holds null"),
    "a list for a title": ({"user": 7, "history": [["Article 1"]]}, 'holds ["Article 1"]'),
    "true for a title": ({"user": 7, "history": [True]}, "holds true"),
    "too deep": ('{"history": ' + "[" * 100_000 + "]" * 100_000 + "}", "is no JSON object"),
    "a number of 5,000 digits": ('{"history": [' + "1" * 5000 + "]}", "is no JSON object"),
}


@pytest.mark.parametrize("bad", BAD)
def test_an_unreadable_line_is_said_with_its_number_and_the_others_are_answered(bad, serve, capsys):
    line, says = BAD[bad]
    got = serve({"history": ["Article 1"]}, "", line, {"user": 8, "history": "a02"})
    assert len(got) == 3
    assert [a["history_ids"] for a in got] == [["a01"], [], ["a02"]]
    assert [len(a["top"]) for a in got] == [2, 0, 2] and got[2]["user"] == 8
    assert got[1]["error"].startswith("line 3: ") and says in got[1]["error"]
    assert got[1].get("user") == (7 if isinstance(line, dict) else None)
    assert "error" not in got[0] and "error" not in got[2]
    said = capsys.readouterr().out
    assert got[1]["error"] in said and "2 histories answered" in said
    assert json.loads(said.splitlines()[-1])["unreadable"] == 1


def test_a_line_without_a_known_title_is_no_answer_and_not_counted_as_one(serve, capsys):
    nobody = {"user": 7, "history": ["zzzz qqqq"]}
    got = serve({"history": ["Article 1"]}, nobody, {"history": []}, "{", {"history": "a02"})
    assert [len(a["top"]) for a in got] == [2, 0, 0, 0, 2]
    assert ["error" in a for a in got] == [False, True, True, True, False]
    assert got[1]["error"].startswith("the history holds no known title (no title 'zzzz qqqq')")
    said = capsys.readouterr().out
    assert "\n2 histories answered in " in said and "2 lines have no known title" in said
    counts = json.loads(said.splitlines()[-1])
    assert (counts["without_known_title"], counts["unreadable"]) == (2, 1)
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("| `error` |")]
    assert "cannot be read" in row and "has no known title" in row


def test_line_ends_of_unicode_within_a_title_end_no_line(serve):
    text = '{"history": ["Article\u20281", "Article\x852", "Article\u20293"]}\r\n'
    assert serve("\ufeff" + text, {"history": ["a04"]})[0]["history_ids"] == ["a01", "a02", "a03"]


def test_names_of_a_file_are_titles_ids_numbers_and_objects(serve):
    lines = [{"history": ["a01", {"id": "a02"}, {"title": "Mug | blue"}]}, {"history": [99]}]
    first, second = serve(*lines, {"history": "Mug | blue | twin"})[:2]
    assert first["history_ids"] == ["a01", "a02", "a05"] and first["unknown"] == []
    assert second["unknown"] == [{"id": "99", "nearest": []}] and second["top"] == []


def test_twins_are_said_in_the_answer_of_their_line(serve, capsys):
    plain, twin = serve({"history": ["Article 1"]}, {"history": ["Twin", "Artikel 11"]})
    assert plain["remarks"] == [] and "(ids a07, a08)" in twin["remarks"][0]
    assert twin["unknown"] == [{"title": "Artikel 11", "nearest": twin["unknown"][0]["nearest"]}]
    assert "Article 11" in twin["unknown"][0]["nearest"]
    assert '1 of them with "remarks"' in capsys.readouterr().out


def test_answers_can_be_asked_again_and_keep_nothing_of_the_earlier_ones(serve):
    lines = [{"user": 1, "history": ["Twin", "zzzz qqqq"]}, {"user": 2, "history": 3}]
    first = serve(*lines, {"history": ["a01"]})
    assert serve(*first) == first
    mended = serve(first[0] | {"history": ["a01"]}, first[1] | {"history": ["a02"]})
    assert [a["history_ids"] for a in mended] == [["a01"], ["a02"]]
    assert all(not a["unknown"] and not a["remarks"] and "error" not in a for a in mended)


# ---------------------------------------------------------------- nothing is lost


def test_half_a_letter_in_a_request_does_not_lose_the_answers(serve):
    got = serve('{"user": "\\ud83d", "history": ["a01", "\\ud83d"]}', {"history": ["a02"]})
    assert got[0]["user"] == "\ud83d" and got[0]["history_ids"] == ["a01"]
    assert got[0]["unknown"][0]["title"] == "\ud83d" and got[1]["history_ids"] == ["a02"]


def test_an_answer_is_printed_whatever_letters_the_terminal_has(shop, alone, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    answer_history(recommender_of(shop).now, alone, {"top": 2}, history="a06 | \udce9")
    said = terminal.buffer.getvalue().decode("ascii")
    answer = json.loads(said.splitlines()[-1])
    assert answer["history_ids"] == ["a06"] and answer["unknown"] == ["\udce9"]
    assert "\\u0422" in said and json.loads(json_line("🍵", "ascii")) == "🍵"


FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@needs_full
@pytest.mark.parametrize("out", [FULL, None])
def test_a_full_disk_prints_the_answers_it_cannot_hold(out, serve, tmp_path, capsys):
    if out is None:
        (tmp_path / "ask.answers.jsonl.tmp").symlink_to(FULL)
    lines = [{"user": n, "history": [f"a{n + 1:02d}"]} for n in range(10)]
    says = sentence(serve, *lines, out=out)
    assert "No space left on device" in says and "printed above" in says
    said = capsys.readouterr().out.splitlines()
    got = [json.loads(line) for line in said if line.startswith('{"user"')]
    assert [a["user"] for a in got] == list(range(10)) and all(len(a["top"]) == 2 for a in got)


def test_answers_scored_before_a_failure_are_in_the_file(shop, alone, tmp_path, capsys):
    lines = [json.dumps({"user": n, "history": ["a01"]}) + "\n" for n in range(200)]
    (tmp_path / "ask.jsonl").write_text("".join(lines))
    calls = []

    def failing(olds, wanted):
        calls.append(len(olds))
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return by_number(olds)

    with pytest.raises(MemoryError):
        ask = tmp_path / "ask.jsonl"
        answer_file(recommender_of(shop, failing).now, alone, {"top": 2}, ask, None)
    kept = tmp_path / "ask.answers.jsonl.tmp"
    assert [a["user"] for a in answers(kept)] == list(range(128))
    assert f"128 answers were scored and stand in {kept}" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space")])
def test_a_closed_pipe_or_full_screen_does_not_stop_the_file(broken, serve, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise broken

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises((BrokenPipeError, click.ClickException)):
        serve({"history": ["a01"]}, {"history": ["a02"]})
    got = answers(tmp_path / "ask.answers.jsonl")
    assert [a["history_ids"] for a in got] == [["a01"], ["a02"]]


@needs_full
def test_an_answer_that_stdout_cannot_hold_stands_on_stderr(shop, alone, monkeypatch, capsys):
    with open(FULL, "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        rule = recommender_of(shop).now
        says = sentence(answer_history, rule, alone, {"top": 2}, history="a01")
        with contextlib.suppress(OSError):
            full.close()
    assert "No space left" in says and "1. Article 40" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_the_run_is_opened(
    shop, alone, tmp_path, capsys
):
    ask = tmp_path / "ask.jsonl"
    ask.write_text('{"history": ["a01"]}\n')
    (tmp_path / "taken").write_text("")

    def opened():
        raise AssertionError("the run was opened")

    never = Answerer(Catalogue(shop), opened, RULE)

    def says(out):
        return sentence(answer_file, never, alone, {"top": 2}, ask, out)

    assert "is a folder" in says(tmp_path)
    assert "the file of the requests itself" in says(ask)
    assert "cannot be written" in says(tmp_path / "taken" / "out.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["ask.jsonl", "taken"]
    with pytest.raises(AssertionError):  # and a run that cannot be opened leaves nothing
        answer_file(never, alone, {"top": 2}, ask, None)
    assert sorted(os.listdir(tmp_path)) == ["ask.jsonl", "taken"]


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    file = AnswerFile(Path(os.devnull), tmp_path / "ask.jsonl")
    assert file.path == file.out == Path(os.devnull)
    file.give_up()
