"""The other way, which one would write with transformers alone: strings tokenised per batch,
padded, all positions through the head, gather.
"""

import numpy as np
import torch

from delrec.data.prepared import Data
from delrec.lm.model import LM


class Rival:
    """The same LM and prompts: one string per prompt (and, for likelihood, per prompt and
    candidate), the soft prompt P spliced in at a placeholder token.
    """

    def __init__(self, lm: LM, data: Data, P_kD: torch.Tensor) -> None:
        from transformers import AutoModelForCausalLM

        self.data, self.P = data, P_kD
        self.tok = lm.tok
        self.tok.padding_side, self.tok.pad_token = "left", self.tok.pad_token or self.tok.eos_token
        self.slot_id = 3
        self.slot = self.tok.convert_ids_to_tokens(self.slot_id)
        model = AutoModelForCausalLM.from_pretrained(
            lm.folder, dtype=lm.dtype, trust_remote_code=False
        )
        self.model = model.to(lm.device).eval().requires_grad_(False)

    def prompt(self, old: np.ndarray, cand: np.ndarray) -> str:
        """The text of a history and its candidates."""
        words, titles = self.data.meta["words"], self.data.titles
        noun, verb = words["noun"], words["verb"]
        return (
            f"How SASRec recommends {noun}s:{self.slot * len(self.P)}\n"
            f"{noun.capitalize()}s the user {verb}, oldest first:\n"
            + "".join(titles[i] + "\n" for i in old)
            + f"Candidate {noun}s:\n"
            + "".join(titles[i] + "\n" for i in cand)
            + f"The next {noun}:\n"
        )

    def tokens(self, text: str) -> list[int]:
        """The ids of a text's tokens, nothing added."""
        return self.tok(text, add_special_tokens=False).input_ids

    def logits(self, texts: list[str]) -> torch.Tensor:
        """logits_BLV of all positions of some prompts."""
        encoded = self.tok(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        encoded = encoded.to(self.model.device)
        x_BLD = self.model.get_input_embeddings()(encoded.input_ids)
        is_slot = encoded.input_ids == self.slot_id
        number = (is_slot.cumsum(1) - 1).clamp(min=0)  # of each slot
        x_BLD = torch.where(is_slot[..., None], self.P.to(x_BLD.dtype)[number], x_BLD)
        mask = encoded.attention_mask
        return self.model(inputs_embeds=x_BLD, attention_mask=mask, use_cache=False).logits

    def scores(self, verbalizer: str, olds: list[np.ndarray], cand_BC: np.ndarray) -> torch.Tensor:
        """score_BC by a verbalizer."""
        by = self.mean if verbalizer == "mean" else self.likelihood
        return by(olds, cand_BC)

    def mean(self, olds: list[np.ndarray], cand_BC: np.ndarray) -> torch.Tensor:
        """score_BC: the mean logit at the mask of a title's tokens."""
        logits_BLV = self.logits([self.prompt(old, cand) for old, cand in zip(olds, cand_BC)])
        rows = []
        for b, cand in enumerate(cand_BC):
            ids = [self.tokens(self.data.titles[i]) for i in cand]
            rows.append(torch.stack([logits_BLV[b, -1, t].float().mean() for t in ids]))
        return torch.stack(rows)

    def likelihood(self, olds: list[np.ndarray], cand_BC: np.ndarray) -> torch.Tensor:
        """score_BC: the mean log probability of a title's tokens behind the prompt."""
        rows = []
        for old, cand in zip(olds, cand_BC):
            prompt = self.prompt(old, cand)
            ends = [self.data.titles[i] + "\n" for i in cand]
            logp_CLV = self.logits([prompt + end for end in ends]).float().log_softmax(-1)
            rows.append(torch.stack([self.mean_of(logp, e) for logp, e in zip(logp_CLV, ends)]))
        return torch.stack(rows)

    def mean_of(self, logp_LV: torch.Tensor, end: str) -> torch.Tensor:
        """The mean log probability of the text `end`, which stands last."""
        ids = torch.tensor(self.tokens(end), device=logp_LV.device)
        return logp_LV[-len(ids) - 1 : -1].gather(1, ids[:, None]).mean()


def add_adalora(model: torch.nn.Module, modules: list[str]) -> torch.nn.Module:
    """The model with AdaLoRA on its modules, as stage 2 has it."""
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        target_modules=modules,
        init_r=12,
        target_r=8,
        lora_alpha=32,
        lora_dropout=0.05,
        total_step=100,
        tinit=10,
        tfinal=30,
        deltaT=1,
        orth_reg_weight=0.0,
    )
    return get_peft_model(model, config)


def plain_orthogonality(adapter: torch.nn.Module) -> torch.Tensor:
    """The orthogonality term as peft computes it: one small product after the other."""
    terms = []
    for name, p in adapter.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            cov = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.norm(cov - torch.eye(len(cov), device=cov.device), p="fro"))
    return sum(terms) / len(terms)
