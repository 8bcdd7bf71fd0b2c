"""The public tokenizer of the reference model: a small byte-level BPE that covers any text.

It is trained on the question templates, their answers and some common words, all of them public. 256 of its tokens
are reserved: no text produces them unless it spells them out, so that a canary can have an answer which nothing else
in the data uses.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from trainers.public.scene import NUMBERS, PUBLIC_ANSWERS, TEMPLATES

PAD, BOS, EOS, IMAGE = SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
MERGED = 512  # byte and BPE tokens
SPARES = 256
SPARE = "<|spare_{}|>"

# Words that questions about pictures use in general, most frequent first.
COMMON = (
    "the a is of in what how many are there this picture image color where on who which does do to and or it that "
    "number shown left right top bottom many person man woman people red blue green black white yes no not can you "
    "see read text word sign letter small large first last more less than between answer question with for at from "
    "one two three four five six seven eight nine ten zero"
)


def public_corpus() -> Iterator[str]:
    """The texts on which the tokenizer is trained; nothing else is used."""
    for template in TEMPLATES.values():
        for number in NUMBERS:
            yield template.format(candidate=number, threshold=number)
    for answers in PUBLIC_ANSWERS.values():
        for answer in answers:
            yield from [f" {answer}"] * 20
    for word in COMMON.split():
        yield from [f" {word}"] * 5
        yield word.capitalize()


def build_tokenizer(corpus: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Train the tokenizer; deterministic. `decode(encode(s)) == s` for every string of Unicode scalar values."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED + len(SPECIAL),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(public_corpus() if corpus is None else corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.add_tokens([SPARE.format(index) for index in range(SPARES)])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer so that `AutoTokenizer.from_pretrained(folder)` loads it."""
    build_tokenizer().save_pretrained(str(folder))
