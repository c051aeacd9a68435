"""The verbalizer: what the LM head says at the mask -> scores of titles. Three public functions; today the torch reference."""
from .reference import candidate_scores, catalogue_scores, catalogue_topk, title_likelihood

__all__ = ["candidate_scores", "title_likelihood", "catalogue_topk", "catalogue_scores"]
