"""A Llama with random weights and a tokenizer of words, written to a folder: no download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

WORDS = 4096
SPECIALS = ("<unk>", "<s>", "</s>")


def _word(number: int) -> str:
    """A word of letters a to z that no other number has."""
    letters = ""
    while number or not letters:
        number, rest = divmod(number, 26)
        letters = chr(ord("a") + rest) + letters
    return "w" + letters


def write(folder: Path, tiny: bool) -> None:
    """Write it: 1.2 billion parameters in bfloat16, or the same in tiny, to see that it runs."""
    sizes = (
        {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        if tiny
        else {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192}
    )
    config = LlamaConfig(
        **sizes,
        vocab_size=WORDS if tiny else 128_256,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 8,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    logging.disable_progress_bar()
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    vocabulary = {word: number for number, word in enumerate(SPECIALS)}
    vocabulary |= {_word(n): n + len(SPECIALS) for n in range(WORDS - len(SPECIALS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
