"""The conventional models as prompts, tables and answers call them."""

# by the name that train_backbone.py --model gives; delrec/backbone/models.py has their networks
NAMES = {
    "sasrec": "SASRec",
    "gru4rec": "GRU4Rec",
    "caser": "Caser",
    "esasrec": "eSASRec",
    "bsarec": "BSARec",
    "lrurec": "LRURec",
    "bert4rec": "BERT4Rec",
    "seqsim": "LLMSEQSIM",
    "kda": "KDA_LRD",
}
