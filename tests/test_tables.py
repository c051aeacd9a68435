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
        assert "least: the smallest true difference" in text
        assert "users with equally many samples (G_eff)" in text
    head = next(
        x for x in (written.folder / "table.md").read_text().splitlines() if x.startswith("| row")
    )
    assert head.count("| least |") == 2


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
  parent.postMessage(JSON.stringify({
    width: innerWidth, sticks: root.scrollWidth - root.clientWidth, all, some, none,
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
    """At phone and desktop width: nothing on the console, nothing sticks out at the side, the
    search finds.
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
    assert seen["all"] == 60 and 0 < seen["some"] < 60 and seen["none"] == 0
    assert seen["images"] == seen["of"] > 3
    assert "CONSOLE" not in done.stderr, [x for x in done.stderr.splitlines() if "CONSOLE" in x]
