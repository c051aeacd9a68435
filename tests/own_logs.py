"""A log of three users and five items in the files that people have, and what is checked of it."""

import pytest
from click import ClickException

from delrec.data.hints import Columns, Request

COMMAND = "python data/prepare.py shop"
ROWS = [(u, i, 1_500_000_000 + 10 * i + u) for u in range(3) for i in range(5)]
HEAD = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def tabbed(rows, head=HEAD):
    return head + "".join(f"{u}\t{i}\t4\t{t}\n" for u, i, t in rows)


def table(rows, head="user,item,timestamp", separator=","):
    lines = [head.replace(",", separator), *(separator.join(map(str, row)) for row in rows)]
    return "\n".join(lines) + "\n"


TITLES = table([(i, f"Tea {i}") for i in range(5)], "item,title")
ATOMIC_TITLES = "item_id:token\ttitle:token_seq\n" + "".join(f"{i}\tTea {i}\n" for i in range(5))


def folder(tmp_path, **files):
    """A folder of files; two underscores in a name stand for a dot, three for a slash."""
    for name, text in files.items():
        path = tmp_path / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def request(*, command="python data/prepare.py shop --raw RAW", **more):
    columns = {key: more.pop(key) for key in list(more) if key in vars(Columns())}
    return Request(columns=Columns(**columns), command=command, **more)


def is_the_log(log, rows=ROWS):
    found = zip(log.rows.user, log.rows.item, log.rows.when.tolist())
    assert sorted(found) == sorted((str(u), str(i), t) for u, i, t in rows)
    assert log.titles == {str(i): f"Tea {i}" for i in range(5)}
    return True


def refusal(read, *args):
    with pytest.raises(ClickException) as refused:
        read(*args)
    assert "\n" not in refused.value.message
    return refused.value.message
