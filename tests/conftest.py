"""Tiny models and data, made on the spot: the suite needs no network and no download."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from browser import launched
from hypothesis import settings
from playwright.sync_api import Browser
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedtune.config import Experiment

settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=300, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)

SENTENCE = (
    "where when how is my card parcel bill doctor phone late lost open closed please help now "
)
SENTENCE += "the a i need want cancel book change order again today tomorrow money back thanks slow"
WORDS = SENTENCE.split()
LABELS = {"status": "late", "hours": "open", "cancel": "cancel"}
FILLERS = ["my", "card", "please", "help", "now"]


def make_tokenizer(folder: Path, *, bert: bool, known: Sequence[str] = WORDS) -> None:
    """A word tokenizer; with BERT's special tokens, or with BOS at the start as Llama has it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if bert else ["<unk>", "<s>", "</s>"]
    punctuation = ["#", ":", "Instruction", "Input", "Response", ".", "?"]
    words = [*special, *known, *punctuation]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1 if bert else 0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bert:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
        }
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers, saved as a bare encoder."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=128,
        )
        BertModel(config).save_pretrained(folder)
    make_tokenizer(folder, bert=True)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder, bert=False)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of two layers: Conv1D modules, and no EOS of its own that Llama's has not."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder, bert=False)
    return folder


def classification_rows(count: int, seed: int, client: str) -> list[dict[str, str]]:
    """Rows whose label shows in one word."""
    draw, rows = random.Random(f"{seed}{client}"), []
    for _ in range(count):
        label = draw.choice(sorted(LABELS))
        words = [*draw.choices(FILLERS, k=draw.randint(0, 4)), LABELS[label], LABELS[label]]
        rows.append({"text": " ".join(words), "label": label, "client": client})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def three_clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and test.jsonl of clients north, south and west with 24, 17 and 9 rows."""
    folder = tmp_path_factory.mktemp("rows")
    sizes = {"north": 24, "south": 17, "west": 9}
    train = [row for name, n in sizes.items() for row in classification_rows(n, 0, name)]
    test = [row for name in sizes for row in classification_rows(8, 1, name)]
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    return folder


@pytest.fixture
def tiny(tiny_bert: Path, three_clients: Path, tmp_path: Path) -> Experiment:
    """A whole experiment that runs in a second."""
    return Experiment().replace(
        name="tiny",
        output=str(tmp_path / "runs"),
        rounds=3,
        model__name=str(tiny_bert),
        model__device="cpu",
        adapter__rank=2,
        data__source=f"jsonl(train='{three_clients}/train.jsonl', "
        f"test='{three_clients}/test.jsonl')",
        train__learning_rate=0.01,
        train__batch_size=4,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; its event loop must not outlive the module that needs it."""
    with launched() as opened:
        yield opened
