"""PruneMe, after Gromov et al. (arXiv 2403.17887): the window of n blocks whose ends are nearest by
angle, for several n, and the loss without each."""

import numpy as np
import torch
from shared import evaluator, loss, main, without

import fastprune as fp

SIZES = (1, 2, 3, 4, 5)


def nearest(distance: np.ndarray, size: int) -> list[int]:
    """The window of `size` blocks with the smallest distance between the states before and after
    it."""
    start = int(np.argmin(np.diagonal(distance, size)))
    return list(range(start, start + size))


@torch.no_grad()
def loop(hf, rows):
    distances, last = [], []
    # the last of transformers' hidden states is after the final norm: the one before it is taken by
    # a hook
    hook = hf.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    for row in rows:
        output = hf(input_ids=row[None], output_hidden_states=True, use_cache=False)
        states = torch.stack([*output.hidden_states[:-1], last.pop()])[
            :, 0, -1
        ].double()  # at the last token
        states = torch.nn.functional.normalize(states, dim=-1)
        distances.append((states @ states.T).clamp(-1, 1).arccos() / torch.pi)
    hook.remove()
    windows = [nearest(torch.stack(distances).mean(0).numpy(), size) for size in SIZES]
    losses = []
    for window in windows:
        with without(hf, window):
            losses.append(loss(hf, rows))
    return windows, losses


def fast(hf, rows):
    ev = evaluator(hf, rows)
    distance = ev.angular_distance()
    windows = [nearest(distance, size) for size in SIZES]
    return windows, ev.score(fp.from_removed(windows, ev.num_units))


if __name__ == "__main__":
    main("pruneme", loop, fast)
