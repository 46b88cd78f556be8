"""A small Llama, two short rows, and their evaluator, for tests that need no others."""

import pytest
from families import build, random_rows

import fastprune as fp


@pytest.fixture(scope="module")
def hf():
    return build("llama")


@pytest.fixture(scope="module")
def batch(hf):
    return fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [13, 9]))


@pytest.fixture(scope="module")
def ev(hf, batch):
    return fp.Evaluator(hf, fp.Perplexity(batch))
