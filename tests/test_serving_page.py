"""docs/serving.md: every example runs, on a log as the page shows it."""

import re

from scripts import ROOT

from delrec.serving import fitting

KINDS = ["Green tea", "Black tea", "White tea", "Herbal tea", "Iced tea"]
WARE = ["Small teapot", "Large teapot", "Cup", "Glass", "Strainer"]
TEAS = [f"{kind} {grams} g" for grams in (100, 50, 250, 500) for kind in KINDS]
ARTICLES = {f"A-{n:02d}": (f"{kind} {n}", "ware") for n, kind in enumerate(WARE * 8, 1)}
ARTICLES |= {f"A-{n:02d}": (name, "tea") for n, name in enumerate(TEAS, 12)}
ARTICLES["A-03"] = ("Small teapot", "ware")


def write_shop(folder):
    """orders.csv and articles.csv: 40 customers, 12 purchases each."""
    items = sorted(ARTICLES)
    orders = [
        f"c{u:03d},{items[(u * 7 + 3 * n) % len(items)]},2024-01-{n + 1:02d}T10:{u:02d}:00\n"
        for u in range(40)
        for n in range(12)
    ]
    (folder / "orders.csv").write_text("customer,article,time\n" + "".join(orders))
    rows = [f"{item},{name},{category}\n" for item, (name, category) in ARTICLES.items()]
    (folder / "articles.csv").write_text("article,name,category\n" + "".join(rows))


def test_every_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    write_shop(tmp_path)
    monkeypatch.chdir(tmp_path)
    real = fitting.run_script

    def quick(script, args, said):
        short = ["--epochs", "1", "--width", "8"] if script.name == "train_backbone.py" else []
        real(script, [*args, *short], said)

    monkeypatch.setattr(fitting, "run_script", quick)
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    names = {}
    examples = re.findall(r"```python\n(.*?)```", page, re.S)
    for example in examples:
        exec(compile(example, "docs/serving.md", "exec"), names)
    assert len(examples) > 6
    assert names["table"].height == 20 and names["answer"].new == ["A-99"]
    assert names["alike"].history == ("A-03",) and len(names["why"].reasons) == 2
    assert names["scores"].ids == ["A-03", "A-07"]
    said = capsys.readouterr().out
    assert "['A-" in said or "A-99" in said
    kept = {"articles.csv", "data", "orders.csv", "runs"}
    assert {path.name for path in tmp_path.iterdir()} == kept
