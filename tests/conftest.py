"""Settings and fixtures shared by all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # what a test needs it brings along
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A busy machine is no failure; a failure found once must be found again.
settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True, scope="session")
def no_encoder_is_installed() -> Iterator[None]:
    """What `dpnlu train` trains unless told otherwise is a BiLSTM, whatever is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpnlu.runs.settings.installed_encoder", lambda: None)
        yield


@pytest.fixture
def hangup_ends() -> Iterator[None]:
    """SIGHUP ends a process, though the tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random BERT and its tokenizer, as the hub would deliver them."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    pieces = [*(chr(c) for c in range(97, 123)), *map(str, range(10))]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *pieces,
        *(f"##{p}" for p in pieces),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
