"""A small checkpoint with a tokenizer, calibration files, and the command line run in this
process."""

from __future__ import annotations

import collections
import gc
import json
import os
import sys

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--no-mkldnn",
        action="store_true",
        help="without oneDNN, as where torch was built without it",
    )
    parser.addoption(
        "--executed",
        action="store_true",
        help="kernels compiled for sm_90a, and executed here: tests/executed",
    )


def pytest_configure(config):
    gc.disable()  # until all is imported
    os.environ.pop("COLUMNS", None)  # which workers of pytest-xdist have, and a file has not
    if hasattr(config, "workerinput") and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = (
            "1"  # threads of several workers that wait take the cores from one another
        )
        torch.set_num_threads(1)
    if config.getoption("--no-mkldnn"):
        torch.backends.mkldnn.set_flags(False)


def pytest_collection_modifyitems(items):
    """Tests of most of a minute begin first: at the end, other workers would wait for them.

    Half of the combinations of `pairs` are nightly: those whose places in the lists of values have
    an odd sum. With three parameters or more, every two values still meet in the others.
    """
    items.sort(
        key=lambda item: not any(item.get_closest_marker(name) for name in ("nightly", "compile"))
    )
    known = collections.defaultdict(list)  # the values of a test's parameter
    for item in items:
        if item.get_closest_marker("pairs"):
            places = 0
            for name, value in item.callspec.params.items():
                values = known[item.nodeid.partition("[")[0], name]
                if value not in values:
                    values.append(value)
                places += values.index(value)
            if places % 2:
                item.add_marker("nightly")


def pytest_collection_finish():
    """Imported modules stay: the collector of garbage need not look through them again and
    again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a random Llama of 5 blocks and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    words = ["<unk>", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(" ".join(f"w{i * i % 60}" for i in range(200)))
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [
        {"prompt": f"w{i} w3 w{i + 2}", "choices": [f" w{i + 3}", " w9 w1", " w5"], "answer": i % 3}
        for i in range(7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit status, stdout, stderr). However slow the machine, no command says
    that it waits."""
    monkeypatch.setattr("fastprune.cli.output.WAITING_SECONDS", 1e6)

    def run(*arguments):
        from fastprune.cli import main

        monkeypatch.setattr(sys, "argv", ["fastprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        output = capsys.readouterr()
        return exit_.value.code, output.out, output.err

    return run
