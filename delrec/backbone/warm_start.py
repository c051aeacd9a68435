"""A backbone that goes on from a finished run, on a log that has grown since (--from).

What the run learnt of an item stays with the item's raw id, whatever its number is now. An item
that the run never saw begins as the mean of all those it knew: until it is trained its score is
that of an ordinary item of its popularity. The optimiser begins anew.

Names: I items of the new data (ids 1..I, 0 pads), E width.
"""

from types import SimpleNamespace

import torch

from delrec.backbone import text_ways
from delrec.backbone.models import is_ours, load
from delrec.backbone.ranking import must_hold_model
from delrec.data import grown
from delrec.data.grown import counted, known_before
from delrec.data.prepared import Data
from delrec.runtime import complete_renames, folder_of, is_run, load_run, stop

FIXED = ("model", "width", "history")  # the shapes of the weights
# unless something else is typed
TAKEN = ("dropout", "loss", "negatives", "lr", "batch")
TAKEN += ("dros", "contrast", "contrast_tau", "one_target", "ema", "fp32")


def is_gone(cfg: SimpleNamespace) -> bool:
    """True where --from names a run that is not there, or not any more."""
    if not cfg.from_run:
        return False
    folder = folder_of("runs", cfg.from_run)
    complete_renames(folder, "config.json")
    return not is_run(folder)


def settle(cfg: SimpleNamespace, typed: set[str]) -> None:
    """Gives each flag that nobody typed the value of the run cfg.from_run. Stops where one was
    typed that the run fixes, or that would say what is not so."""
    run = load_run(cfg.from_run, stages=["train_backbone"])
    must_hold_model(run)
    if not is_ours(run):
        name = getattr(run, "model", None)
        stop(
            f"{run.folder} is a model of your own, {name!r:.40}, which cannot be trained here; "
            "train from scratch without --from"
        )
    for flag in ("teacher", "folds"):
        if getattr(cfg, flag):
            stop(
                f"--{flag} and --from were given, but the run that --from names has learnt of all "
                f"users, and without a teacher's help; leave --{flag} out, or train from scratch "
                "without --from"
            )
    of_text = {"--text": cfg.text, "--cold-out": cfg.cold_out, "--no-offset": not cfg.offset}
    for flag, is_given in (of_text | text_ways.flags_of_text(cfg)).items():
        if is_given:
            stop(
                f"{flag} and --from were given, but the item vectors that --from goes on from are "
                f"trained already, with their titles or without; leave {flag} out, or train from "
                "scratch without --from"
            )
    own = grown.own_values(run, (*FIXED, *TAKEN))
    grown.settle(cfg, typed, own, FIXED, run)


@torch.no_grad()
def carry_over(model: torch.nn.Module, name: str, data: Data) -> str:
    """What was carried over from a run into an untrained model of the same shape, as a sentence.
    The model's biases are those of popularity in the new data."""
    run = load_run(name)
    from_I, n_before = known_before(run, data)
    is_known_I = from_I > 0
    old = load(run.folder).state_dict()
    weights = {key: value for key, value in old.items() if key not in ("item.weight", "bias")}
    item_IE, bias_I = model.item.weight.cpu().clone(), model.bias.cpu().clone()
    known, new = torch.from_numpy(is_known_I), torch.from_numpy(~is_known_I)
    new[0] = False  # the padding
    item_IE[known] = old["item.weight"][from_I[is_known_I]]
    item_IE[new] = item_IE[known].mean(0)
    own_I = old["bias"][from_I[is_known_I]]
    # biases count from where training left them, not from popularity's zero
    bias_I += (own_I - bias_I[known]).mean()
    bias_I[known] = own_I
    model.load_state_dict(weights | {"item.weight": item_IE, "bias": bias_I})
    return (
        f"{run.folder}: {int(is_known_I.sum())} of {data.n_items} items keep what they learnt, "
        + counted(from_I, n_before)
    )
