"""Small tokenizers of every family that a model directory may bring, built by the `tokenizers` library itself."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = ["a", "b", "x", "▁", "▁the", "▁a", "a▁b", "▁▁", "é", "ß", "の", "�", "."]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FIRST_WORD = 1 + len(BYTES)
"""Id of WORDS[0] in llama() and gemma(); <unk> and the bytes come before."""


def _bpe(tokens: list[str], **options: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], **options))
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def llama() -> Tokenizer:
    """Llama 2's: metaspace by replacement, byte fallback, and one blank stripped from the front of a text."""
    tokenizer = _bpe(["<unk>", *BYTES, *WORDS], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def gemma() -> Tokenizer:
    """Gemma's: as Llama 2's, with nothing stripped."""
    tokenizer = _bpe(["<unk>", *BYTES, *WORDS], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def stripping() -> Tokenizer:
    """As Llama 2's, with several blanks stripped from the front, so that a text may begin with tokens without text."""
    tokenizer = llama()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 3, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's and XLM-R's: the Metaspace decoder, which drops blanks of the first token."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in WORDS)], 0))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT's: words parted by blanks, ## for continuations, blanks before punctuation cleaned up."""
    tokens = ["[UNK]", "the", "##re", "##a", "a", ".", ",", "n't", "の"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def suffix() -> Tokenizer:
    """The first GPT's: </w> ends a word, and becomes a blank unless it is the last."""
    tokenizer = _bpe(["a", "b</w>", "</w>", "the</w>", "の"])
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


def plain() -> Tokenizer:
    """No decoder at all: tokens parted by blanks."""
    return _bpe(["a", "b", "の"])


def byte_level() -> Tokenizer:
    """GPT-2's alphabet and nothing else, with an added token that is not written in it."""
    tokenizer = _bpe(sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([AddedToken("two words の", normalized=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    return tokenizer


FAMILIES = {
    family.__name__: family for family in (llama, gemma, stripping, metaspace, wordpiece, suffix, plain, byte_level)
}
