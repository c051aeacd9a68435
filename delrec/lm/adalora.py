"""AdaLoRA (arXiv 2303.10512): adapters of the LM whose ranks move to where they are needed.

An adapted weight is W + B E A with E diagonal. All ranks begin at init_r; between the steps tinit
and total - tfinal the least important values of E are cut until target_r a layer are left on
average; then training goes on at the ranks that were found. Only then can a step be the best one.
"""

from types import SimpleNamespace
from typing import Any

import torch

from delrec.lm.model import LM, adapted
from delrec.runtime import Run


def add_adalora(lm: LM, modules: list[str], cfg: SimpleNamespace, steps: int) -> torch.nn.Module:
    """The LM's model with adapters on `modules`; they are all that trains.

    cfg: init_r, target_r, alpha, dropout, prune_end."""
    from peft import AdaLoraConfig, get_peft_model

    end = end_of_pruning(cfg.prune_end, steps)
    config = AdaLoraConfig(
        target_modules=modules,
        init_r=cfg.init_r,
        target_r=cfg.target_r,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        total_step=steps,
        tinit=max(end // 5, 1),
        tfinal=steps - end,
        deltaT=1,
        orth_reg_weight=0.0,  # orthogonality() is the term
    )
    return with_fixed_scale(get_peft_model(lm.model, config))


def with_fixed_scale(adapter: torch.nn.Module) -> torch.nn.Module:
    """The adapter, of which only A, E and B train. In peft the rank that a layer's product is
    divided by (ranknum) is a parameter too, which no run folder holds; where it casts adapters of a
    bf16 LM to fp32, it would let that train."""
    for name, p in adapter.named_parameters():
        if "ranknum" in name:
            p.requires_grad_(False)
    return adapter


def go_on(lm: LM, run: Run, dropout: float) -> torch.nn.Module:
    """The LM's model with the adapter of a run, which trains on; the ranks found there are
    final."""
    adapter = with_fixed_scale(adapted(lm, run, dropout))
    adapter.base_model.rankallocator = None
    return adapter


def end_of_pruning(share: float, steps: int) -> int:
    """The step at which ranks are cut for the last time, that share of all steps; 2 at least, as
    the first cut comes before."""
    return max(round(share * steps), 2)


def has_adapters(model: torch.nn.Module) -> bool:
    """False for an LM whose own weights train (--adapt all): it has no ranks to move."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def allocator_of(adapter: torch.nn.Module) -> Any:
    """peft's, which moves the ranks; None where there are no adapters, or their ranks are final
    from the beginning."""
    return adapter.base_model.rankallocator if has_adapters(adapter) else None


def orthogonality(adapter: torch.nn.Module) -> torch.Tensor:
    """AdaLoRA's penalty R: the mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F.

    Eq. 4 sums the squares of these norms; peft, and so we, take the mean of the norms. Matrices of
    one shape are computed together.
    """
    by_shape = {}
    for name, p in adapter.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            w_rd = p if "lora_A" in name else p.T
            by_shape.setdefault(w_rd.shape, []).append(w_rd)
    norms = []
    for same in by_shape.values():
        w_Nrd = torch.stack(same)
        off_Nrr = w_Nrd @ w_Nrd.mT - torch.eye(w_Nrd.shape[1], device=w_Nrd.device)
        norms.append(off_Nrr.flatten(1).norm(dim=1))
    return torch.cat(norms).mean()


def reallocate(adapter: torch.nn.Module, step: int) -> None:
    """Moves the ranks after step number `step`, by the importances that its gradients give."""
    if allocator_of(adapter) is not None:
        adapter.base_model.update_and_allocate(step)


def adapted_layers(adapter: torch.nn.Module) -> int:
    """How many layers have an adapter."""
    return sum("lora_E" in name for name, _ in adapter.named_parameters())


def whole_rank(adapter: torch.nn.Module) -> int:
    """Singular values that the adapters have, over all adapted layers, whether kept or cut."""
    return sum(len(p) for name, p in adapter.named_parameters() if "lora_E" in name)


def active_rank(adapter: torch.nn.Module) -> int:
    """Singular values that AdaLoRA keeps, over all adapted layers.

    Not those that differ from zero: Lion moves by multiples of the learning rate, so a kept one
    stands at exactly 0 now and then.
    """
    if has_adapters(adapter) and (kept := adapter.peft_config["default"].rank_pattern):
        return sum(map(sum, kept.values()))
    return whole_rank(adapter)


def pruning_steps(adapter: torch.nn.Module) -> tuple[int, int, int]:
    """The steps between which ranks are cut, and the steps in all."""
    config = adapter.peft_config["default"]
    return config.tinit, config.total_step - config.tfinal, config.total_step


def last_cut(adapter: torch.nn.Module) -> int:
    """The step at which ranks are cut for the last time; 0 where none are."""
    return pruning_steps(adapter)[1] if allocator_of(adapter) is not None else 0


def ranks_are_final(adapter: torch.nn.Module, step: int) -> bool:
    """True once the step number `step` is behind the last at which ranks are cut."""
    return step >= last_cut(adapter)


class Importances:
    """What the allocator knows and no state_dict of torch's holds, as a part of a checkpoint."""

    AVERAGES = ("exp_avg_ipt", "exp_avg_unc")

    def __init__(self, adapter: torch.nn.Module, device: torch.device):
        self.device, self.allocator = device, allocator_of(adapter)
        if self.allocator is not None:
            self.config = adapter.peft_config["default"]

    def state_dict(self) -> dict:
        """The averages of each weight's importance, and the pattern of ranks; nothing where no
        ranks move."""
        if self.allocator is None:
            return {}
        averages = {
            f"{name}/{k}": t
            for name in self.AVERAGES
            for k, t in getattr(self.allocator, name).items()
        }
        return averages | {"rank_pattern": self.config.rank_pattern}

    def load_state_dict(self, state: dict) -> None:
        """Gives the allocator what state_dict said."""
        if self.allocator is None:
            return
        for name in self.AVERAGES:
            own = {k: t for k, t in state.items() if k.startswith(f"{name}/")}
            average = {k.split("/", 1)[1]: t.to(self.device) for k, t in own.items()}
            setattr(self.allocator, name, average)
        # its keys say that the averages have begun; its values are made anew
        self.allocator.ipt = dict(self.allocator.exp_avg_ipt)
        self.config.rank_pattern = state["rank_pattern"]
