"""Three kinds of tiny LM as Hugging Face folders, with tokenizers in the way of the real ones.

Nothing here is trained: the LMs are random, with weights large enough that what they read changes
what they say.
"""

import json

import pytest
import torch
from toys import title_of

KINDS = ["decoder", "encoder_decoder", "flan", "encoder"]


def corpus():
    """What the tokenizers are trained on: the titles and the words of the prompts."""
    return [title_of(n) for n in range(60)] * 4 + [
        "Movies the user watched, oldest first:",
        "Candidate movies:",
        "The next movie:",
        "The next movie was:",
        "Later movies:",
        "So the most recent movie was:",
        "How SASRec recommends movies:",
        "SASRec's choices after its first:",
        "SASRec's first choice:",
        "A. B. C. D. E. F. G. H. I. J. K. L. M. N. O. P. Q. R. S. T. U. V. W. X. Y. Z.",
    ] * 8


def bpe_tokenizer():
    """Byte-level BPE in the way of SmolLM2, with a token that begins every text (as Llama's)."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def unigram_tokenizer():
    """Unigram over Metaspace with sentinels and a closing </s>, in the way of T5. The pieces are
    given, not trained: training is not the same twice.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(10))]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;'()▁"
    words = sorted(
        {f"▁{w}" for w in " ".join(corpus()).split() if w.isalpha()}
        | {f"▁{c}" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    )
    tok = Tokenizer(
        models.Unigram(
            [(t, 0.0) for t in special]
            + [(c, -12.0) for c in letters]
            + [(w, -6.0) for w in words],
            unk_id=2,
        )
    )
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
    )


def wordpiece_tokenizer():
    """Lower-cased WordPiece between [CLS] and [SEP], in the way of BERT."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;'()"
    words = sorted(
        {w for w in " ".join(corpus()).lower().split() if w.isalpha() and len(w) > 1}
        - {"carnival", "mountain"}
    )
    vocab = {
        t: i
        for i, t in enumerate(
            [*special, *letters, *(f"##{c}" for c in letters), *words, "##ni", "moun"]
        )
    }
    tok = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer, tok.decoder = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def randomise(model, seed, gain=1.5):
    """Weights large enough that every part of the prompt moves the scores; a tied head stays
    tied.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(
                    torch.randn(p.shape, generator=generator)
                    * (0.7 if "embed" in name or "shared" in name else gain * p.shape[1] ** -0.5)
                )
            elif "bias" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.eval()


def save(folder, model, tok):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """The folder of a two-layer Llama, width 32, tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = bpe_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=3,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )
    return save(tmp_path_factory.mktemp("lms") / "tiny-llama", randomise(model, 1), tok)


def t5(folder):
    from transformers import T5Config, T5ForConditionalGeneration

    tok = unigram_tokenizer()
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tok),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    return save(folder, randomise(model, 2), tok)


@pytest.fixture(scope="session")
def encoder_decoder(tmp_path_factory):
    """The folder of a two-layer T5, width 32, tied head (and so scaled outputs), as transformers
    makes it.
    """
    return t5(tmp_path_factory.mktemp("lms") / "tiny-t5")


@pytest.fixture(scope="session")
def flan(tmp_path_factory):
    """The same T5 with a head of its own in the file and tie_word_embeddings false, as Flan-T5
    ships.
    """
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("lms") / "tiny-flan"
    t5(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = (
        torch.randn(weights["shared.weight"].shape, generator=torch.Generator().manual_seed(3))
        * 0.3
    )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a two-layer BERT, width 32, tied head with a bias."""
    from transformers import BertConfig, BertForMaskedLM

    tok = wordpiece_tokenizer()
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tok),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=512,
        )
    )
    return save(tmp_path_factory.mktemp("lms") / "tiny-bert", randomise(model, 4), tok)


@pytest.fixture(scope="session")
def load(request):
    """load(kind) -> the LM of load_lm in fp32 on the CPU, loaded once a session.

    Nobody may change it.
    """
    from delrec.lm.model import load_lm

    loaded = {}

    def get(kind):
        if kind not in loaded:
            loaded[kind] = load_lm(
                request.getfixturevalue(kind), torch.device("cpu"), torch.float32
            )
        return loaded[kind]

    return get
