"""What stays different from DELRec (arXiv 2406.11156) under --paper, which prints it.

docs/differences.md says the same, and why; tests/test_differences.py holds the two together.
"""

BOTH = (
    "The LM is --llm's, by default SmolLM2-135M; the paper's is google/flan-t5-xl.",
    "The split is data/prepare.py's; the paper's text splits by time, its release by users.",
    "Candidates are drawn once and stored; the paper's are drawn in every run, and may repeat "
    "the target or the history.",
    "The prompts' words are ours; instruction and soft prompt come first, the candidates after "
    "the history.",
    "A title scores by the mean logit of its tokens, as we read the paper's simple verbalizer; its "
    "release takes the first token.",
    "Histories shorter than 10 are not padded.",
    "The backbone learns by cross-entropy over all items, from the training part alone; "
    "train_backbone.py --loss bce is the papers' loss, Adam for GRU4Rec's Adagrad stays.",
    "Lion runs in 32 bits, the release's in 8. The warm-up is ours, the paper names none.",
    "The best step is chosen on validation samples; the paper does not say how it chose.",
)
STAGE_1 = (
    *BOTH,
    "The paper names no batch and no number of steps: they are its release's (20 samples, 800 "
    "steps).",
    "RPS tells the backbone's choices r_2..r_h before the mask, not after it: a decoder-only LM "
    "cannot see behind.",
    "A history shorter than a + 2 asks no Temporal Analysis.",
    "The weights of the two losses are held fixed in the gradient; the release's are not.",
    "RPS's candidates are r_1 and items outside of the backbone's list, the paper's text; its "
    "release's are --rps-candidates release.",
)
STAGE_2 = (
    *BOTH,
    "The paper names no batch and no number of steps: they are its release's (20 samples, 1,400 "
    "steps).",
    "AdaLoRA goes from rank 12 to 8, and by --prune-end; the paper names no rank, its release "
    "starts at 320 and never cuts.",
)
