"""Which numbers dropout draws in a step of stage 2, beside the seed: what --resume looks after."""

from types import SimpleNamespace

import torch

from delrec.lm.pretrained import text_config
from delrec.runtime import stop


class Draws:
    """What decides, beside the seed, which numbers dropout draws in a step: every pass draws anew.
    A part of a checkpoint, which is continued with the same alone. Without dropout all is free."""

    def __init__(self, cfg: SimpleNamespace, adapter: torch.nn.Module, micro: int):
        """cfg: cache_prefix, shard, residual_dropout. micro: as it was settled."""
        passes = {"micro": micro, "cache_prefix": cfg.cache_prefix, "shard": cfg.shard}
        self.passes = passes if cfg.residual_dropout or drops(adapter) else {}

    def state_dict(self) -> dict:
        """{flag: its value}; empty without dropout."""
        return self.passes

    def load_state_dict(self, state: dict) -> None:
        """Stops where a flag was another; of a checkpoint that holds none it is not known."""
        for flag, was in state.items():
            if (now := self.passes.get(flag, was)) != was:
                so = f"give --micro {was}" if flag == "micro" else "run it as it was"
                stop(
                    f"cannot resume: {flag.replace('_', '-')} was {was}, now it is {now}, with "
                    f"which dropout would draw other numbers; {so}, or begin anew with "
                    "--overwrite instead of --resume"
                )


def is_rate(name: str) -> bool:
    """True for the name of a rate that a pass may drop by; heads that classify are not read."""
    return "drop" in name and not any(head in name for head in ("classifier", "summary"))


def drops(adapter: torch.nn.Module) -> bool:
    """True where a training pass may draw numbers: by a module, or by a call that only the LM's
    configuration tells (OPT's dropout and layerdrop)."""
    told = text_config(adapter.config).to_dict()
    parts = [told, *(part for part in told.values() if isinstance(part, dict))]
    rates = [rate for part in parts for name, rate in part.items() if is_rate(str(name))]
    own = (m.p for m in adapter.modules() if isinstance(m, torch.nn.Dropout))
    return any(isinstance(rate, float) and rate for rate in rates) or any(own)
