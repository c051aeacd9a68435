"""What a table leaves behind: text, markdown, LaTeX, CSV, figures, and the page, looked at in
Chromium where there is one.
"""

import csv
import html
import json
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from pictures import drawing

import evaluate
from delrec.evaluation.comparisons import AMONG_CANDIDATES
from delrec.evaluation.page import compared, highest
from delrec.evaluation.verdict import verdict
from delrec.evaluation.wording import least, mark, p_text, short


@pytest.fixture(scope="module", autouse=True)
def pictures():
    with drawing():
        yield


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def written(toy, sasrec, backbone, script, fp32, tmp_path_factory):
    """Two backbones evaluated on a catalogue with titles that look like markup: .folder, .page,
    .result.
    """
    folder = tmp_path_factory.mktemp("written")
    data = shutil.copytree(toy.folder, folder / "toy")
    titles = (data / "titles.txt").read_text().split("\n")
    titles[:3] = [
        "</script><script>alert(1)</script>",
        "A & B | C_1 50% <i>x</i>",
        "日本 \"quoted\" 'title'",
    ]
    (data / "titles.txt").write_text("\n".join(titles), encoding="utf-8")
    copy = shutil.copytree(sasrec, folder / "a_b&c%")
    with fp32():
        result = script(
            evaluate.main,
            "--ckpt",
            copy,
            backbone,
            "--dataset",
            data,
            "--out",
            folder / "out",
            "--report",
            folder / "out.html",
            "--margin",
            0.35,
            0.35,
        )
    return SimpleNamespace(
        folder=folder / "out",
        page=folder / "out.html",
        result=result,
        found=metrics_of(folder / "out"),
    )


def test_csv_holds_the_numbers_of_the_table(written):
    with open(written.folder / "table.csv", encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    rows = written.found["rows"]
    assert [x["row"] for x in lines] == list(rows)
    for line in lines:
        row = rows[line["row"]]
        for column, key in (("HR@1", "hr@1"), ("NDCG@10", "ndcg@10"), ("MRR", "mrr")):
            assert float(line[column]) == pytest.approx(row[key], abs=1e-6)
        for key in ("p", "p_adjusted", "p_t", "least", "p_equal"):
            said = line[f"{key.replace('_', ' ')} HR@1"]
            if row["test"] is None:
                assert said == ""
            else:
                assert float(said) == pytest.approx(row["test"]["hr@1"][key], abs=1e-6)


def test_markdown_and_latex_have_whole_rows(written):
    lines = [x for x in (written.folder / "table.md").read_text().splitlines() if x.startswith("|")]

    def count(x):
        return len(re.findall(r"(?<!\\)\|", x))

    assert len(lines) == 2 + len(written.found["rows"]) and len({count(x) for x in lines}) == 1
    tex = (written.folder / "table.tex").read_text()
    body = [x for x in tex.splitlines() if x.endswith("\\\\")]
    assert (
        len(body) == 1 + len(written.found["rows"])
        and len({len(re.findall(r"(?<!\\)&", x)) for x in body}) == 1
    )
    assert "a\\_b\\&c\\%" in tex and "a_b&c%" not in tex.replace("% ", "")
    best = written.found["rows"]["a_b&c%"]
    assert short(best["hr@1"]) in tex
    assert [short(x) for x in (0.5714, 1.0, 0)] == [".571", "1.000", ".000"]
    assert [p_text(p) for p in (0.034, 1, 1e-4, 2e-5, 1e-20)] == [
        "p=.034",
        "p=1",
        "p=.0001",
        "p=2e-05",
        "p<1e-15",
    ]


def test_marks_say_what_the_adjusted_tests_say(written):
    lines = (written.folder / "table.txt").read_text().splitlines()
    seen = set()
    for name, row in written.found["rows"].items():
        line = next(x for x in lines if x.startswith(f"{name} "))
        test = row["test"] and row["test"]["hr@1"]
        marks = re.search(r"\d\.\d{3}([*=]*)", line).group(1)
        assert marks == mark(test), line
        if test:
            p = test["p_adjusted"]
            assert marks.rstrip("=") == ("**" if p < 0.01 else "*" if p < 0.05 else "")
            assert ("=" in marks) == (test["p_equal"] < 0.05)
            assert f" {least(test)} " in line
        seen.add(marks)
    assert {"", "="} <= seen


def test_the_marks_of_a_test():
    def marked(p, p_equal=1.0):
        return mark({"p_adjusted": p, "p_equal": p_equal})

    assert [marked(p) for p in (0.2, 0.05, 0.04, 0.01, 0.009)] == ["", "", "*", "*", "**"]
    assert [marked(0.2, p) for p in (0.05, 0.04)] == ["", "="]
    assert marked(0.001, 0.001) == "**=" and mark(None) == marked(None) == ""


def test_a_reader_finds_what_the_marks_and_the_least_difference_mean(written):
    for text in (
        (written.folder / "table.txt").read_text(),
        (written.folder / "table.md").read_text(),
        html.unescape(written.page.read_text(encoding="utf-8")),
    ):
        assert "shown to differ from" in text and "= shown to be equal to it within .350" in text
        assert "least: the smallest true difference" in text and "alone, before Holm" in text
        assert "users with equally many samples (G_eff)" in text
    head = next(
        x for x in (written.folder / "table.md").read_text().splitlines() if x.startswith("| row")
    )
    assert head.count("| least |") == 2


def test_text_and_page_open_with_the_verdict(written):
    said = verdict(written.found)
    text = (written.folder / "table.txt").read_text()
    assert text.splitlines()[: len(said)] == said
    assert written.result.stdout.find(said[0]) < written.result.stdout.find("\nrow ")
    page = html.unescape(written.page.read_text(encoding="utf-8"))
    places = [page.find(sentence) for sentence in said]
    assert places[0] > 0 and places == sorted(places) and places[-1] < page.find("<h2>")
    assert any("over all" in sentence for sentence in said)


def test_a_reader_finds_which_way_a_star_points(written):
    for text in (
        (written.folder / "table.txt").read_text(),
        (written.folder / "table.md").read_text(),
        html.unescape(written.page.read_text(encoding="utf-8")),
    ):
        assert "the row is better where its number is the higher one" in text


def test_figures_are_pictures(written):
    names = {p.name for p in written.folder.glob("*.png")}
    assert {
        "table.png",
        "by-items.png",
        "by-interactions.png",
        "by-pair.png",
        "by-time.png",
        "training.png",
    } <= names
    assert all((written.folder / n).read_bytes()[:4] == b"\x89PNG" for n in names)


# ---------------------------------------------------------------- the page


def test_the_page_says_what_was_typed(toy, sasrec, script, on_cpu, tmp_path):
    page = tmp_path / "not" / "there" / "x.html"
    args = [
        "--ckpt",
        sasrec,
        "--limit",
        20,
        "--no-show",
        "--fuse",
        "popularity",
        "co-occurrence",
        "--fuse",
        "sasrec",
        "popularity",
        "--out",
        tmp_path / "a b",
        "--report",
        page,
    ]
    script(evaluate.main, *args)
    said = html.unescape(re.search(r"Written by <code>(.*?)</code>", page.read_text()).group(1))
    program, *typed = shlex.split(said)[1:]
    # it asks for the same once more
    with (
        evaluate.main.make_context(program, typed) as again,
        evaluate.main.make_context(program, [str(a) for a in args]) as first,
    ):
        assert again.params == first.params


def test_the_page_needs_no_network_and_titles_stay_text(written):
    page = written.page.read_text(encoding="utf-8")
    assert (
        page.count("<script>") == 1
        and "alert(1)</script>" not in page
        and "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    )
    assert (
        not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page)
        and "@import" not in page
        and "fetch(" not in page
    )
    assert (
        written.found["protocol"] in page
        and "a_b&amp;c%" in page
        and "HR@1 by items in the history" in page
    )
    cases = re.findall(r"<details><summary>.*?&middot; (.*?)</summary>", page)
    assert len(cases) == 60 and all("a_b&amp;c%" in c and "sasrec" in c for c in cases)
    assert page.count('class="true"') + page.count("class=true") > 60


def table_after(page, title):
    """The first table behind a title: [(is the row best?, [(is the cell best?, its text)])]."""

    def cells(row):
        return [(bool(best), x) for best, x in re.findall(r"<td( class.*?)?>(.*?)<", row)]

    body = re.search(r"<tbody>(.*?)</tbody>", page[page.index(title) :]).group(1)
    return [
        (bool(best), cells(row)) for best, row in re.findall(r"<tr( class.*?)?>(.*?)</tr>", body)
    ]


@pytest.mark.parametrize(
    ("title", "rows", "metric"),
    [("Among candidates", "rows", "ndcg@10"), ("Over all 60 items", "full", "ndcg@20")],
)
def test_the_best_row_of_a_table_is_bold_and_that_is_said(written, title, rows, metric):
    found = {name: v[metric] for name, v in written.found[rows].items()}
    best = [name for name, v in found.items() if v == max(found.values())]
    page = written.page.read_text(encoding="utf-8")
    bold = [cells[0][1] for is_best, cells in table_after(page, f"<h2>{title}") if is_best]
    assert list(map(html.unescape, bold)) == best and len(best) < len(found)
    legend = f"Bold row: the highest {metric.upper()}"
    assert page.find(legend, page.index(f"<h2>{title}")) > 0


@pytest.mark.parametrize("near", [True, False], ids=["among candidates", "over all items"])
def test_the_best_of_every_group_is_bold(written, near):
    kind = "items in the history"
    page = written.page.read_text(encoding="utf-8")
    title = f"<h2>HR@1 by {kind}" if near else f"<h3>HR@20 over all items by {kind}"
    table = [cells for _, cells in table_after(page, title)]
    for i, group in enumerate(written.found["groups"][kind].values(), 1):
        of_near = {name: v["hr@1"] for name, v in group["rows"].items()}
        value = of_near if near else group["all_items"]
        best = [name for name, v in value.items() if v == max(value.values())]
        assert [html.unescape(cells[0][1]) for cells in table if cells[i][0]] == best
    assert "Bold: the highest number of each group" in page


def test_in_the_paired_tests_a_row_is_bold_only_above_the_reference():
    def compared_by(*gains):
        test = {"p": 1.0, "p_t": 1.0, "p_adjusted": 1.0, "p_equal": 1.0, "least": 0.1}
        test |= {"of_users": None, "p_of_users": None}
        found = {f"row{i}": {m: test | {"difference": x} for m in AMONG_CANDIDATES}
                 for i, x in enumerate(gains)}  # fmt: skip
        return compared("row minus sasrec", found, AMONG_CANDIDATES)

    above, below = compared_by(-0.1, 0.2, 0.1), compared_by(-0.1, -0.2)
    assert [is_best for is_best, _ in table_after(above, "<table")] == [False, True, False]
    assert "Bold row: the one furthest above the reference in NDCG@10" in above
    assert 'class="best"' not in below and "none is above the reference" in below


def test_a_column_without_a_second_number_has_no_best():
    assert [highest(x) for x in ([0.1], [None, 0.2], [], [0.1, None, 0.3, 0.3])] == [
        set(), set(), set(), {2, 3},
    ]  # fmt: skip


def test_tables_stand_in_boxes_and_keep_their_first_column(written):
    """What the style says; the tests in a browser see it at work."""
    page = written.page.read_text(encoding="utf-8")
    assert page.count("<table") == page.count('<div class="scroll" tabindex="0"><table') > 5
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", style)
    first = re.search(r"\nth:first-child, td:first-child \{([^}]*)\}", style).group(1)
    for rule in ("position: sticky", "left: 0", "background: Canvas"):
        assert rule in first


def test_the_case_study_shows_stored_scores(written, toy, backbone):
    found = re.search(
        r"<details><summary>(.*?)</summary>", written.page.read_text(encoding="utf-8")
    ).group(1)
    assert re.search(r"sasrec \d+(\.5)?\.", found)  # the place of the truth


CHROMIUM = next(
    (
        p
        for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
        if p
    ),
    None,
)


LOOK = """<script>
window.addEventListener("load", () => {
  const box = document.getElementById("search"), root = document.documentElement;
  const histories = [...document.querySelectorAll("#cases details")];
  const shown = () => histories.filter(x => x.offsetParent).length;
  const searched = words => {
    box.value = words;
    box.dispatchEvent(new Event("input"));
    return shown();
  };
  const all = shown();
  const some = searched(document.querySelector("#cases details .true").textContent);
  const none = searched("no such words at all");
  const images = [...document.images];
  const boxes = [...document.querySelectorAll(".scroll")].filter(x => x.querySelector("table"));
  const wide = boxes.filter(x => x.scrollWidth > x.clientWidth);
  for (const x of boxes) x.scrollLeft = x.scrollWidth;
  const left = x => x.getBoundingClientRect().left;
  const seen = (x, tag) => Math.abs(left(x.querySelector(tag)) - left(x)) < 1;
  parent.postMessage(JSON.stringify({
    width: innerWidth, sticks: root.scrollWidth - root.clientWidth, all, some, none,
    wide: wide.length, moved: wide.filter(x => x.scrollLeft > 0).length,
    kept: boxes.filter(x => seen(x, "th") && seen(x, "td")).length, boxes: boxes.length,
    inside: boxes.filter(x => x.getBoundingClientRect().right <= innerWidth).length,
    images: images.filter(x => x.naturalWidth > 0).length, of: images.length,
  }), "*");
});</script>"""
FRAME = """<iframe src="inner.html" id="f" style="width:{width}px;height:900px;border:0"></iframe>
<script>
addEventListener("message", e => document.documentElement.dataset.seen = e.data);
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (apt install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(written, tmp_path, width):
    """At phone and desktop width: nothing on the console, nothing sticks out at the side, tables
    move in their boxes and keep their first column, the search finds.
    """
    page = written.page.read_text(encoding="utf-8").replace("</body>", LOOK + "</body>")
    (tmp_path / "inner.html").write_text(page, encoding="utf-8")
    (tmp_path / "page.html").write_text(FRAME.format(width=width), encoding="utf-8")
    flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --dump-dom"
    flags += " --enable-logging=stderr --window-size=1400,1000 --virtual-time-budget=8000"
    where = [f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(
        [CHROMIUM, *flags.split(), *where], capture_output=True, text=True, timeout=120
    )
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, done.stdout[-500:] + done.stderr[-2000:]
    seen = json.loads(seen.group(1).replace("&quot;", '"'))
    assert seen["width"] == width and seen["sticks"] <= 0
    assert seen["inside"] == seen["kept"] == seen["boxes"] > 5 and seen["moved"] == seen["wide"]
    assert seen["wide"] >= 3 or width > 390  # else there was nothing to move
    assert seen["all"] == 60 and 0 < seen["some"] < 60 and seen["none"] == 0
    assert seen["images"] == seen["of"] > 3
    assert "CONSOLE" not in done.stderr, [x for x in done.stderr.splitlines() if "CONSOLE" in x]
