"""The generic path: any decoder-only transformers model, unit by unit, through its own layers.

A decoder layer needs the arguments that its model's forward passes to it: position embeddings, a
mask per layer type, and so on. `GenericRunner.open` runs the model's own forward with recorders in
place of the layers. It learns these arguments for any family without naming it, at the cost of the
embeddings alone.

B rows of T tokens, D columns of a state.
"""

from __future__ import annotations

from functools import cached_property
from typing import overload

import torch

from .head import Head
from .model import Model
from .swap import Arguments, Recorder, State, Sublayers, first, unpack
from .tree import tree_mask
from .windows import longest_window, probe_length, windows_of


class GenericRunner:
    """Runs a model's units through its own layers (see `Runner`).

    Attributes:
        sublayers: The two halves of every block; `verify.verified` sets them for "sublayer".
    """

    path_name = "generic"  # beside "fused (...)", see FusedRunner

    def __init__(self, model: Model):
        self.model, self.device = model, model.device
        self.sublayers: list[Sublayers] = []
        self._recorder = Recorder(model.path, model.hf)
        self.head = Head(model, self._recorder.after_layers)

    @property
    def takes_tuples(self) -> bool:
        """Whether the model takes a tuple from each layer."""
        return bool(self._recorder.takes_tuples)

    # -- units -------------------------------------------------------------------------------------

    @overload
    def run(self, unit: int, state: State, arguments: Arguments) -> torch.Tensor: ...

    @overload
    def run(self, unit: int, state: State, arguments: Arguments, granularity: str) -> State: ...

    def run(
        self, unit: int, state: State, arguments: Arguments, granularity: str = "block"
    ) -> State:
        """Run one unit on a state [B, T, D], and return the next. A skipped unit has no call."""
        if granularity == "block":
            return first(self.model.layers[unit](state, **arguments[unit]))
        block, is_mlp = divmod(unit, 2)
        sublayers = self.sublayers[block]
        step = sublayers.mlp if is_mlp else sublayers.attention
        return step(state, arguments[block])

    def unpack(self, packed: torch.Tensor, unit: int) -> State:
        """Restore the state that `swap.pack` packed after this unit."""
        return unpack(packed, self.sublayers, unit)

    # -- embeddings and layer arguments ------------------------------------------------------------

    def open(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        branch: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Arguments]:
        """Embed rows of tokens, and find the arguments of every layer.

        In a token tree, a token sees the earlier tokens of the trunk and of its own branch.

        Args:
            ids: Token ids, int64[B, T].
            positions: The positions of a tree's tokens, int64[B, T]; None for plain causal rows.
            branch: The branches of a tree's tokens, 0 for the trunk, int64[B, T]; likewise.

        Returns:
            The embedded tokens, [B, T, D], and the arguments by layer.
        """
        if branch is None:
            state, arguments = self._recorder(input_ids=ids)
            if state.dim() != 3:
                raise self.model.refusal(
                    f"its states have {state.dim()} dimensions, and only [rows, tokens, hidden "
                    f"size] are run"
                )
            return state, arguments
        assert positions is not None
        windows = [window or None for window in self.windows(int(positions.max()) + 1)]
        masks = {
            window: self._layer_mask(tree_mask(positions, branch, window))
            for window in {None, *windows}
        }
        state, arguments = self._recorder(
            input_ids=ids, position_ids=positions, attention_mask=masks[None]
        )
        for layer, window in zip(arguments, windows, strict=True):
            layer["attention_mask"] = masks[window]
        return state, arguments

    def embed(
        self, ids: torch.Tensor, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Arguments]:
        """Like `open`, without building attention masks.

        A single value, expanded to their shape, replaces them and takes no memory.
        """
        nothing = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device)
        nothing = nothing.expand(len(ids), 1, ids.shape[1], ids.shape[1])
        return self._recorder(input_ids=ids, position_ids=positions, attention_mask=nothing)

    def windows(self, length: int) -> list[int | None]:
        """Each layer's sliding window, as the model's own forward masks a row of this length.

        A layer that sees all earlier tokens has None. A layer whose mask has another form has
        `windows.NO_WINDOW_FORM`. A window longer than the row may read as None.
        """
        probed, longest, windows = self._probe
        if length <= probed or longest < probed:
            return windows
        return self._windows_at(min(length, longest + 1))

    @cached_property
    def _probe(self) -> tuple[int, int, list[int | None]]:
        """The length of the probed row, the config's longest window, and each layer's window."""
        length = probe_length(self.model)
        windows = self.model.once("windows", lambda: self._windows_at(length))
        return length, longest_window(self.model.hf), windows

    def _windows_at(self, length: int) -> list[int | None]:
        ids = torch.zeros(1, length, dtype=torch.int64, device=self.device)
        _, arguments = self._recorder(input_ids=ids)
        return windows_of([of_layer.get("attention_mask") for of_layer in arguments])

    def _layer_mask(self, seen: torch.Tensor) -> torch.Tensor:
        """Convert a mask bool[B, 1, T, T], True = seen, to the form that layers take.

        sdpa takes it as it is; eager attention takes additive values in the model's dtype.
        """
        if self.model.config._attn_implementation == "sdpa":
            return seen
        dtype = self.model.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)

    # -- bits --------------------------------------------------------------------------------------

    def numerics(self) -> str:
        """The settings of this path that decide the bits of a score, as text."""
        return f"{self.path_name}, {self.head.numerics()}"
