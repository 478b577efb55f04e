"""Training of the byte-level BPE tokenizer: 4,096 tokens, lossless, split for Python source.

A newline with its indentation and the word after it may become one token (`\\n        return`), as may
an identifier with the character before it (`.append`, ` self`); digits come in groups of up to three.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
PATTERN = (
    r"(?:\r?\n[ \t]*)+[A-Za-z_]*"
    r"|[^\s\w]?[A-Za-z_]+| [A-Za-z_]+"
    r"|\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\w]+"
    r"|[^\S\n]+"
)


def train_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Fit the merges to `texts`; `max_length` is the context of the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = begin_with_bos(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def begin_with_bos(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    """Return the processor that puts the start token in front of each text, as in training."""
    return processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
