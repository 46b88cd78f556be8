"""Bits do not depend on the addresses of weights: loaded ones are aligned, and the addresses of a
model in memory are part of its digest."""

import struct

import numpy as np
import pytest
import torch
from families import build, num_blocks, random_rows, some_masks

import fastprune as fp


def moved(folder, remainder):
    """Let the tensors of a checkpoint begin at an address with this remainder by 64."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, tensors = raw[8 : 8 + length].rstrip(b" "), raw[8 + length :]
    header += b" " * ((remainder - 8 - len(header)) % 64)
    path.unlink()  # models that are open keep the file of before
    path.write_bytes(struct.pack("<Q", len(header)) + header + tensors)


def off_by(hf, count):
    """Move every weight to an address `count` bytes behind an aligned one."""
    for weight in hf.parameters():
        size = weight.itemsize
        room = torch.empty(weight.numel() + 64 // size, dtype=weight.dtype)
        start = (count - room.data_ptr()) % 64 // size
        weight.data = room[start : start + weight.numel()].view(weight.shape).copy_(weight.data)
    return hf


def losses(model):
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(97, [21, 33])))
    masks = some_masks(num_blocks(model.hf), 20, seed=3)
    return fp.Evaluator(model, text).score(masks).tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_in_a_file_change_no_bit(tmp_path, dtype):
    build("llama", dtype).save_pretrained(tmp_path)
    moved(tmp_path, 0)
    first = fp.load_model(tmp_path, dtype="auto")
    digest, expected = first.digest, losses(first)
    for remainder in (8, 2):
        moved(tmp_path, remainder)
        model = fp.load_model(tmp_path, dtype="auto")
        assert {weight.data_ptr() % 64 for weight in model.hf.parameters()} == {0}
        assert model.digest == digest
        assert losses(model) == expected
        streamed = fp.load_model(tmp_path, dtype="auto", weights_bytes=150_000)
        assert streamed.weights.streamed
        assert streamed.digest == digest
        assert losses(streamed) == expected


def test_tied_weights_stay_tied(tmp_path):
    build("llama-tied").save_pretrained(tmp_path)
    moved(tmp_path, 8)
    hf = fp.load_model(tmp_path).hf
    assert hf.lm_head.weight is hf.model.embed_tokens.weight


def test_addresses_of_a_model_in_memory_are_part_of_its_digest():
    digests = [fp.Model(off_by(build("llama"), count)).digest for count in (0, 8, 8, 16)]
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3


def test_the_order_of_a_weight_in_memory_is_part_of_the_digest():
    hf, other = build("llama"), build("llama")
    weight = other.lm_head.weight
    weight.data = weight.data.T.contiguous().T
    assert torch.equal(hf.lm_head.weight, weight)
    assert fp.Model(hf).digest != fp.Model(other).digest


def test_a_model_moved_in_memory_is_scored_rightly():
    hf = build("llama")
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(97, [21, 33])))
    ev = fp.Evaluator(hf, text)
    masks = some_masks(num_blocks(hf), 20, seed=3)
    before = ev.score(masks)
    off_by(hf, 8)
    np.testing.assert_allclose(ev.score(masks), before, rtol=1e-5)
