"""The words of the prompts: ours, as the paper prints none. Write your own here (docs/methods.md).

In a sentence {n} is what an item is called ("movie"), {N} the same at its beginning, {v} what users
do with it ("watched"), {b} the backbone's name.
"""

import hashlib
import json

from delrec.runtime import stop

# w MCP (DELRec, Table III): what a backbone does, in words where the soft prompt would stand. Ours,
# as the paper does not print its own.
PATTERN = {
    "SASRec": "{b} weighs all {n}s of the history by how much they say about the last one: {n}s "
    "liked by users with a similar recent history come next.",
    "GRU4Rec": "{b} reads the {n}s one after another and remembers what matters: the latest {n}s "
    "count most, older ones fade.",
    "Caser": "{b} looks for patterns among the last few {n}s, pairs and triples that follow one "
    "another, and adds the user's general taste.",
    "eSASRec": "{b} weighs all {n}s of the history as attention does, and a gate decides how much "
    "of what it found counts beside the latest {n}.",
    "BSARec": "{b} looks at the slow drift and the quick turns of the user's taste: what the "
    "history has in common, and the latest {n}s where they differ.",
    "LRURec": "{b} reads the {n}s one after another, and each fades at its own speed: some habits "
    "last, some are over with the next {n}.",
    "BERT4Rec": "{b} reads the history in both directions and fills in the {n} that is missing: "
    "the one behind the last, from all that stand around it.",
    "LLMSEQSIM": "{b} reads what the {n}s are called, and nothing else: the {n}s whose titles are "
    "most like those of the latest ones come next.",
    "KDA_LRD": "{b} holds each {n} against the history and asks in which ways it is related to the "
    "{n}s there: what is related to them comes next.",
}
# One instruction a task (section IV-A), in our words: stage 2, and stage 1's two tasks.
INSTRUCTIONS = {
    "history": "Say which {n} the user will choose next; the way {b} recommends is a reference.",
    "ta": "Follow the order of time as {b} does: say which {n} came last before the next one.",
    "rps": "Recommend as {b} does: say which {n} it puts first after these.",
}
# What stands in front of a history, of its summary, and of the soft prompt.
ABOUT = {
    "history": "{N}s the user {v}, oldest first:",
    "summary": "What the {n}s the user {v} are about:",
    "backbone": "How {b} recommends {n}s:",
}
# The other words of a prompt, by the names they have here.
WORDS = {
    "candidates": "Candidate {n}s:",
    "next": "The next {n}:",
    "next was": "The next {n} was:",
    "most recent was": "So the most recent {n} was:",
    "later": "Later {n}s:",
    "choices": "{b}'s choices after its first:",
    "first choice": "{b}'s first choice:",
    "hint": "{b} would choose:",
    "latest": "The last {n}s, oldest first:",
}


def lists_candidates(settings: dict) -> bool:
    """True where prompts of these settings, or flags, list the candidates."""
    return settings["show"] or settings["verbalizer"] == "letter"


def pattern_of(backbone: str) -> str:
    """w MCP's words about a backbone; SASRec's for one that has none (runs of earlier versions)."""
    return PATTERN.get(backbone, PATTERN["SASRec"])


def must_have_pattern(backbone: str) -> None:
    """Stops where nothing says in words how a backbone recommends."""
    if backbone not in PATTERN:
        stop(
            "--soft-prompt words says in words how the backbone recommends, but PATTERN in "
            f"delrec/lm/wording.py has none for {backbone!r:.40}; add a sentence there, or give "
            "--soft-prompt none"
        )


def wording_of(settings: dict, stage_1: bool = False) -> str:
    """16 hex digits of the fixed words in prompts of a run's settings, as they are written here
    before any name is filled in. stage_1: of its two tasks, too."""
    lists, hint = lists_candidates(settings), settings["hint"] != "none"
    used = {"candidates": lists, "hint": hint, "next": lists or hint, "latest": settings["summary"]}
    told = {name: words for name, words in WORDS.items() if stage_1 or used.get(name)}
    told["about"] = ABOUT["summary" if settings["summary"] else "history"]
    if settings["backbone"]:  # a plain LM has none
        told["about backbone"] = ABOUT["backbone"]
    if settings["instruct"]:
        told["asked"] = INSTRUCTIONS if stage_1 else INSTRUCTIONS["history"]
    if settings.get("words"):
        told["pattern"] = pattern_of(settings["backbone"])
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
