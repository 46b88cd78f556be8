"""Losses where only some tokens count."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp


@pytest.mark.parametrize("backend", ["generic", "fused"])
@pytest.mark.parametrize("objective", [fp.Perplexity, fp.KLDivergence])
def test_labels_and_masks_count_as_in_transformers(backend, objective):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes, **heads)).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0  # padding at the right
    labels = ids.masked_fill((torch.rand(ids.shape, generator=generator) < 0.5) | (mask == 0), -100)
    batch = fp.TokenBatch.from_ids({"input_ids": ids, "attention_mask": mask, "labels": labels})
    ev = fp.Evaluator(fp.Model(hf), objective(batch), backend=backend)
    masks = fp.from_removed([(), (1,), (0, 2)], 4)
    measured = ev.score(masks)
    dense = None
    for loss, removed in zip(measured, [(), (1,), (0, 2)], strict=True):
        with torch.no_grad(), fp.masked(hf, removed) as pruned:
            logits = pruned(input_ids=ids, attention_mask=mask, use_cache=False).logits.double()
        logp = torch.log_softmax(logits[:, :-1], -1)
        dense = logp if dense is None else dense
        counted = labels[:, 1:] != -100
        values = {
            fp.Perplexity: -logp.gather(-1, ids[:, 1:, None])[..., 0],
            fp.KLDivergence: (dense.exp() * (dense - logp)).sum(-1),
        }[objective]
        expected = ((values * counted).sum() / counted.sum()).item()
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
