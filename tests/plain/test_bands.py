"""Bands: blocks that are loaded together, and chunks that share the loading, from bytes."""

import pytest

import fastprune as fp
from fastprune.plan.bands import make_groups, make_room


def test_half_of_the_room_is_for_the_band_that_computes():
    for num_blocks in range(1, 40):
        for places in range(1, 45):
            room = make_room(1000 + 70 * places + 69, num_blocks, 70, 1000, "m")
            assert room.places == min(places, num_blocks)
            assert [block for band in room.bands for block in band] == list(range(num_blocks))
            sizes = list(map(len, room.bands))
            assert max(sizes) - min(sizes) <= 1
            if places >= num_blocks:
                assert len(sizes) == 1
            else:
                assert max(sizes) * 2 <= max(2, places)
                assert len(sizes) == -(-num_blocks // max(1, places // 2))  # no fewer would do


def test_a_limit_for_less_than_a_block():
    assert make_room(1070, 3, 70, 1000, "m").places == 1
    with pytest.raises(fp.InputError, match="the smallest that works is 1070, not 1069"):
        make_room(1069, 3, 70, 1000, "m")


def test_groups_are_as_large_as_the_states_may_be():
    groups = make_groups(
        [10, 10, 10, 25, 3], [0] * 5, load_bytes=7, memory=25, slower=0, flops_per_byte=1
    )
    assert groups == ((0, 1), (2,), (3,), (4,))
    assert make_groups([99], [0], 7, 25, 0, 1) == ((0,),)
    assert make_groups([], [], 7, 25, 0, 1) == ()


def test_a_slower_tier_is_used_where_that_is_cheaper_than_loading_again():
    dear = make_groups([10] * 4, [0] * 4, load_bytes=1000, memory=10, slower=30, flops_per_byte=1)
    assert dear == ((0, 1, 2, 3),)
    cheap = make_groups([10] * 4, [0] * 4, load_bytes=5, memory=10, slower=30, flops_per_byte=1)
    assert len(cheap) == 4
    # what hides behind computing costs nothing, so that states stay in memory
    hidden = make_groups(
        [10] * 4, [5000] * 4, load_bytes=1000, memory=10, slower=30, flops_per_byte=1
    )
    assert len(hidden) == 4
