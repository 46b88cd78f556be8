"""The byte budget holds as the kernel measures it: growth of a fresh process's resident memory."""

import json
from pathlib import Path

import pytest
from helpers import run_python

CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 resets the peak that /proc/self/status reports

MEASURE = """
import json, re, warnings
from pathlib import Path
import numpy as np, torch, transformers as tf
import fastprune as fp

torch.manual_seed(0)
config = tf.LlamaConfig(
    vocab_size=503, hidden_size=256, intermediate_size=INTERMEDIATE, num_hidden_layers=16, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
)
model = fp.Model(tf.AutoModelForCausalLM.from_config(config).eval())
rng = np.random.default_rng(0)

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

def grown(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    result = work()
    return result, memory("VmHWM") - before

def score(memory_bytes, cache_bytes=0):
    ev = fp.Evaluator(model, fp.Perplexity(batch), memory_bytes=memory_bytes, cache_bytes=cache_bytes)
    losses = ev.score(masks)
    assert np.isfinite(losses).all() and len(np.unique(losses)) > len(masks) // 2
    return ev.stats.peak_activation_bytes

def random_batch(rows):
    return fp.TokenBatch.from_ids(rng.integers(0, 503, (rows, 67)))

batch, masks = random_batch(1), np.ones((3, 16), dtype=bool)
masks[1, 3] = masks[2, 5] = False
score(None)  # what libraries load or keep when they are first used
batch = random_batch(ROWS)
masks = rng.random((MASKS, 16)) < 0.5
masks[:, 7] |= ~masks.any(axis=1)
"""


def measure(script: str, **constants: int) -> dict:
    """Run a script in a process of its own; blocks of 128 KiB and more go back to the kernel when they are freed."""
    if not CLEAR_REFS.exists():
        pytest.skip("the kernel keeps no peak that can be reset")
    header = "".join(f"{name} = {value}\n" for name, value in constants.items())
    output = run_python(header + MEASURE + script, MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
def test_a_thousand_random_masks_in_64_mib():
    """A state weighs 0.13 MiB here: keeping that of every mask, or of every node of the trie, would take 2 or 9 times
    the budget."""
    budget = 64 << 20
    found = measure(
        f"""
peak, growth = grown(lambda: score({budget}))
_, meter = grown(lambda: torch.ones({budget} // 4))
print(json.dumps(dict(peak=peak, growth=growth, meter=meter)))
""",
        INTERMEDIATE=192,
        ROWS=2,
        MASKS=1000,
    )
    assert found["meter"] >= 0.95 * budget  # the meter sees what is allocated
    assert 1 << 20 < found["growth"] <= budget
    assert 1 << 20 < found["peak"] <= budget


@pytest.mark.slow
def test_a_small_budget_makes_small_chunks():
    """The same work without the budget takes more than it: the budget is what keeps memory down."""
    budget = 16 << 20
    found = measure(
        f"""
free_peak, free = grown(lambda: score(None))
peak, growth = grown(lambda: score({budget}))
print(json.dumps(dict(peak=peak, growth=growth, free_peak=free_peak, free=free)))
""",
        INTERMEDIATE=1024,
        ROWS=32,
        MASKS=4,
    )
    assert found["free"] > budget
    assert found["free_peak"] > budget
    assert found["growth"] <= budget
    assert found["peak"] <= budget


def test_the_prefix_cache_adds_its_budget_and_no_more():
    """Every node of the trie would take 7 times both budgets together."""
    budget, cache = 24 << 20, 16 << 20
    found = measure(
        f"""
peak, growth = grown(lambda: score({budget}, {cache}))
print(json.dumps(dict(peak=peak, growth=growth)))
""",
        INTERMEDIATE=192,
        ROWS=2,
        MASKS=500,
    )
    assert found["growth"] <= budget + cache
    assert found["growth"] >= cache // 2  # it is used
