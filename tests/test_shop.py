"""A shop's one table goes to a prepared folder at the first try, and each refusal on the way shows
the command that works.
"""

import re
import shlex
from datetime import datetime, timedelta

from logs import random_log, run

from delrec.data.prepared import load_data

HEADER = "Bestellzeit;Kundennummer;Artikelnummer;Artikelbezeichnung;Menge"


def orders(path, encoding="utf-8"):
    """The random log as a shop exports it: an order's time by ISO, its customer, article and the
    article's name, between semicolons.
    """
    lines = [HEADER]
    for user, item, time in random_log():
        when = datetime(2024, 1, 1) + timedelta(minutes=int(time))
        lines.append(f"{when:%Y-%m-%dT%H:%M:%S};K{user};{item};Tee für {item} Tage;1")
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def test_a_shop_s_one_table_is_prepared_by_the_command_that_the_refusal_shows(tmp_path):
    path, out = orders(tmp_path / "shop.csv"), tmp_path / "out"
    words = ["--noun", "tea bag", "--verb", "bought"]
    refused = run("shop", "--interactions", path, "--out", out, *words)
    assert refused.exit_code == 1 and refused.output.count("\n") == 1
    command = re.search(r"name yours: (.*)", refused.output)[1]
    assert command == (
        f"python data/prepare.py shop --interactions {path} --out {out} --noun 'tea bag' "
        "--verb bought --user-column Kundennummer --item-column Artikelnummer "
        "--time-column Bestellzeit --title-column Artikelbezeichnung"
    )
    result = run(*shlex.split(command)[2:])
    assert result.exit_code == 0 and "WARNING" not in result.output, result.output
    assert "note: shop.csv: its cells are separated by ';'" in result.output
    data = load_data(str(out))
    assert data.titles[1] == f"Tee für {(out / 'raw_items.txt').read_text().split()[0]} Tage"
    assert data.meta["words"] == {"noun": "tea bag", "verb": "bought"}
    assert data.meta["split"] == "temporal" and data.times[0] >= 1_704_067_200
    for name in (out, f"{out}/"):  # a folder is checked as a name is
        checked = run(name, "--check")
        assert checked.exit_code == 0 and "checks hold" in checked.output, checked.output


def test_a_folder_that_is_no_prepared_one_is_not_checked(tmp_path):
    assert "no prepared data set in" in run(tmp_path / "out", "--check").output
