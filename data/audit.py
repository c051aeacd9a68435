"""The audit of a log (prepare.py --audit): what its order, its times and its popularity allow to be
said of models on it. Everything here is counted; nothing is trained.

The numbers are made in order.py and drift.py; here they are put into words.
"""

from dataclasses import dataclass
from pathlib import Path

from delrec.data.drift import (
    RECENT,
    SESSION,
    cold_of,
    future_of,
    gaps_of,
    popularity_of,
    repeats_of,
)
from delrec.data.log import Log
from delrec.data.order import rules_under_shuffling, shuffling_of, ties_of
from delrec.data.pictures import draw_audit
from delrec.data.prepared import Data
from delrec.data.rules import Rules
from delrec.runtime import write_json

MANY_TIES = 0.05  # a share of ties from which on the order is not known
CLEAR = (
    0.03  # by so much above the shuffled order, or above chance, the rule of ids knows something
)
FEW_RULES = 20  # so many rules say something
ORDERS = {
    "shuffled": "shuffled once",
    "item": "by item id",
    "file": "as in the file",
    "untied": "in their order",
}


@dataclass
class Block:
    """A part of the page."""

    title: str
    lines: list[str]  # the numbers
    means: str  # one sentence: what they mean


def audit(log: Log, rules: Rules, data: Data) -> dict:
    """All numbers of the audit (audit.json). data: the prepared folder of the log by these rules,
    whose split is named.
    """
    return {
        "name": data.name,
        "hash": data.meta["hash"],
        "split": data.meta["split"],
        "test": len(data.test),
        "ties": ties_of(log, rules, data),
        "rules": rules_under_shuffling(data),
        "shuffling": shuffling_of(data),
        "gaps": gaps_of(data),
        "cold": cold_of(data),
        "repeats": repeats_of(data),
        "future": future_of(data),
        "popularity": popularity_of(data),
    }


def audit_folder(log: Log, rules: Rules, data: Data) -> None:
    """Prints the audit of a prepared folder, and writes audit.json and audit.png into it."""
    found = audit(log, rules, data)
    write_json(data.folder / "audit.json", found)
    print("\n" + "\n".join(page_of(found)) + "\n")
    draw_audit(found, data, Path(data.folder / "audit.png"))
    print(f"audit: {data.folder / 'audit.png'}, numbers in {data.folder / 'audit.json'}")


def page_of(found: dict) -> list[str]:
    """The lines of the page."""
    lines = [
        f"audit of {found['name']} (hash {found['hash']}), {found['split']} split, "
        f"{found['test']:,} test targets; nothing is trained here"
    ]
    blocks = [
        ties_block(found["ties"]),
        rules_block(found["rules"]),
        shuffling_block(found["shuffling"]),
        gaps_block(found["gaps"]),
        cold_block(found["cold"]),
        repeats_block(found["repeats"]),
        future_block(found["future"]),
        popularity_block(found["popularity"]),
    ]
    for n, block in enumerate(blocks, 1):
        lines += ["", f"{n}. {block.title}", *(f"   {line}" for line in block.lines)]
        lines.append(f"   => {block.means}")
    return lines


# ---------------------------------------------------------------- order


def ties_block(ties: dict) -> Block:
    """Ties, and the rule of ids under every order of them."""
    lines = [
        f"{ties['share']:.1%} of the interactions and {ties['share_test']:.1%} of the test targets "
        "have the time of the user's interaction before",
        'the rule "lowest candidate id above the last item\'s" (1 of 15 by chance, '
        f"{ties['chance']:.1%}) is right, with interactions of equal time",
        *(f"  {ORDERS[order]:<16}{right:>6.1%}" for order, right in ties["next_id"].items()),
    ]
    return Block("ties", lines, meaning_of_ties(ties))


def meaning_of_ties(ties: dict) -> str:
    """What the ties mean."""
    rule = ties["next_id"]
    base = rule.get("shuffled", max(rule.values()))
    leaks = [ORDERS[order] for order, right in rule.items() if right > base + CLEAR]
    if not ties["known"]:
        said = "only an order is known, as published: ties in it cannot be seen"
    elif ties["share"] < MANY_TIES:
        said = "nearly every interaction has a time of its own: the order is known"
    else:
        said = f"{ties['share']:.0%} of the order is not known"
    if leaks:
        said += (
            f"; ties {' and '.join(leaks)} give the answer away: what a model gains there over "
            "the shuffled order is a leak, no skill"
        )
    if base > ties["chance"] + CLEAR:
        return f"{said}; ids say something by themselves: the next item's id is often a near one"
    return said if leaks else f"{said}; ids do not give it away"


def rules_block(rules: dict) -> Block:
    """Sequential rules and what a shuffling leaves of them."""
    lines = [
        "items that follow each other more than 5 times and with a confidence over .1:",
        *(rules_line(f"{name} items", v) for name, v in rules.items()),
    ]
    two = rules["two"]
    if two["rules"] < FEW_RULES:
        means = "too few pairs of items follow each other often to say anything"
    elif two["change"] < -0.5:
        means = "most rules are gone when each user's items are shuffled: the order holds them"
    else:
        means = "most rules are there without the order too: it is little more than popularity"
    return Block("rules of what comes next", lines, means)


def rules_line(name: str, v: dict) -> str:
    """The rules of one length."""
    change = "no rule" if v["change"] is None else f"{v['change']:+.0%}"
    return f"  {name:<12}{v['rules']:>8,} rules, {v['shuffled']:,.1f} shuffled ({change})"


def shuffling_block(found: dict) -> Block:
    """What co-occurrence loses."""
    lines = [
        f"co-occurrence in training ranks {found['samples']:,} test samples of {found['users']:,} "
        "users; their histories are changed, the counts and targets stay",
        f"{found['length_1']:.1%} of the histories hold one item and cannot change, "
        f"{found['long']:.1%} hold five or more (long); five draws, p by sign-flip over users",
        f"  {'changed':<28}{'NDCG@10, all items':>26}{'long ones':>20}{'HR@1 of 15':>26}"
        f"{'Jaccard@10':>12}",
    ]
    for name, v in found["variants"].items():
        long = v["long"]
        lines.append(
            f"  {name:<28}{from_to(v['ndcg@10'], 4):>26}"
            f"{loss(long['ndcg@10']) if long else '':>20}{from_to(v['hr@1'], 3):>26}"
            f"{v['jaccard']:>12.2f}"
        )
    variants = {name: v["ndcg@10"] for name, v in found["variants"].items()}
    whole, but_last = variants["whole history"], variants["all but the last item"]
    if not is_loss(whole):
        means = "no loss is seen: no order, or none that counting pairs can see"
    elif is_loss(but_last):
        means = "the order matters, and not by the last item alone"
    else:
        means = "what matters is which item is the last; no loss is seen in the order before it"
    means += " (a trained model: evaluate.py --shuffle-history)"
    return Block("histories shuffled", lines, means)


def is_loss(v: dict) -> bool:
    """True if a metric fell by more than luck."""
    return v["after"] < v["before"] and v["p"] < 0.05


def loss(v: dict) -> str:
    """By which part a metric changed, with its p."""
    change = f"{v['after'] / v['before'] - 1:+.1%}" if v["before"] else "none"
    return f"{change} p={v['p']:.2g}"


def from_to(v: dict, digits: int) -> str:
    """A metric before, and by which part it changed."""
    return f"{v['before']:.{digits}f} {loss(v)}"


# ---------------------------------------------------------------- time


def duration(units: float, unit: float | None) -> str:
    """A time in words. unit: how many seconds one is; None: nobody knows."""
    if unit is None:
        return f"{units:,.0f} units"
    seconds = units * unit
    for length, word in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:,.1f} {word}"
    return f"{seconds:,.0f} s"


def gaps_block(gaps: dict | None) -> Block:
    """The time between a user's interactions."""
    if gaps is None:
        return Block("gaps", ["no times, only an order"], "nothing can be said of time")
    unit, deciles = gaps["unit"], gaps["deciles"]
    lines = [
        f"between a user's interactions: median {duration(deciles[4], unit)}; deciles "
        + ", ".join(duration(decile, unit) for decile in deciles),
        f"{gaps['zero']:.1%} are 0; the median user has {duration(gaps['life'], unit)} from first "
        "to last",
    ]
    if unit is None:
        return Block("gaps", lines, "the unit of the times is not known: no seconds since 1970")
    if gaps["days_only"]:
        return Block("gaps", lines, "times are whole days: what happened within one has no order")
    lines.append(f"{gaps['session']:.1%} are within a session (under {SESSION // 60} minutes)")
    if gaps["session"] > 0.5:
        means = "most of it is one sitting: the next item is the next of a session, not of a life"
    else:
        means = "most interactions stand apart in time"
    return Block("gaps", lines, means)


def cold_block(cold: dict) -> Block:
    """Users and items that training never saw."""
    lines = [
        f"{part}: {v['users']:.1%} of the samples are of users that training never saw, "
        f"{v['items']:.1%} have such a target"
        for part, v in cold.items()
    ]
    worst = cold["test"]
    means = "a model of ids can know nearly all of the test part"
    if worst["items"] >= 0.05:
        means = "a model of ids cannot find the targets it never saw: they bound its hit rate"
    elif worst["users"] >= 0.05:
        means = "many test users are new: what counts is their history, not who they are"
    return Block("cold users and items", lines, means)


def repeats_block(repeats: dict) -> Block:
    """Items that a user had before."""
    lines = [
        f"{repeats['all']:.1%} of the interactions and {repeats['test']:.1%} of the test targets "
        f"are with an item the user had before, {repeats['at_once']:.1%} with the one just before"
    ]
    if repeats["test"] >= 0.01:
        means = "lists mask the history, so these targets can never stand in one"
    else:
        means = "the history can be masked at no cost"
    return Block("repeats", lines, means)


def future_block(future: dict | None) -> Block:
    """What leave-one-out would tell of the future."""
    title = "leave-one-out against the clock"
    if future is None:
        return Block(title, ["no times, only an order"], "what it would leak cannot be said")
    lines = [
        f"{future['any']:.1%} of its test targets (each user's last) lie before some training "
        "interaction of another user",
        f"{future['share']:.1%} of its training interactions lie after a test target, on average "
        "over the targets",
        f"{future['item']:.1%} of the targets have their own item in a training interaction of "
        "another user after them",
    ]
    means = "so much of the future would a model have seen; a temporal split shows none of it"
    return Block(title, lines, means)


def popularity_block(found: dict) -> Block:
    """How popularity moves, and how far it goes."""
    lines = [
        f"the most popular 1 % of the items in training are {found['top_1']:.1%} of the test "
        f"targets, 10 % are {found['top_10']:.1%}"
    ]
    if found["thirds"]:
        a, b, c = found["thirds"]
        lines.insert(
            0,
            "rank correlation of the items' popularity between thirds of the interactions: "
            f"1-2 {a:.2f}, 2-3 {b:.2f}, 1-3 {c:.2f}",
        )
    if "recent" not in found:
        return Block(
            "popularity", lines, "recent popularity needs times and a temporal split: not measured"
        )
    lines.append(
        f"HR@10 over all items: popularity {found['overall']:.4f}, of training's last {RECENT} "
        f"days ({found['recent_count']:,} interactions) {found['recent']:.4f}, p={found['p']:.2g}"
    )
    return Block("popularity", lines, meaning_of_recent(found))


def meaning_of_recent(found: dict) -> str:
    """What recent popularity is worth against that of the whole training."""
    if found["p"] >= 0.05:
        return (
            f"no difference is shown between recent popularity and all of it (p={found['p']:.2g})"
        )
    if found["recent"] > found["overall"]:
        return "popularity moves: the recent one is the floor that a model has to beat"
    return "recent popularity is a lower floor than that of the whole training"
