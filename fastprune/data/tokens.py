"""Calibration data: trees of tokens, and a hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

from ..errors import InputError
from .ids import to_rows

Ids = Sequence[int] | np.ndarray  # of tokens
NOT_TOKENS = {"tokens": False}  # marks fields that are no part of the content


@dataclass(frozen=True, repr=False)
class TokenBatch:
    """Rows of tokens, each a tree: a trunk, then branches that see the trunk and themselves but not
    each other.

    Plain text is a trunk without branches. The answers to one question share the question as their
    trunk, so it is run once. All arrays are int64; rows stand one after the other, whatever their
    lengths (R rows, C continuations, M targets, T tokens in all).

    ids, positions, branch [T]: token id, position in its own sequence, branch in its row (0 =
    trunk). row_starts [R + 1]: the first index of each row in them. target_source, target_token,
    target_continuation [M]: a target is a token whose probability counts: the state
        at `target_source` predicts `target_token`, for continuation `target_continuation`.
    continuation_row [C]: the row of each continuation (a text row has one, a question one per
    choice).
    row_words, row_bytes [R]: words and UTF-8 bytes of the text of each row's targets; None unless
        the rows were read from text.
    source: the file or data set that the rows came from and the column that was read, for people.

    Examples:
        >>> import fastprune as fp
        >>> fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
        TokenBatch(2 rows, 2 continuations, 5 tokens)
    """

    ids: np.ndarray
    positions: np.ndarray
    branch: np.ndarray
    row_starts: np.ndarray
    target_source: np.ndarray
    target_token: np.ndarray
    target_continuation: np.ndarray
    continuation_row: np.ndarray
    row_words: np.ndarray | None = field(default=None, metadata=NOT_TOKENS)
    row_bytes: np.ndarray | None = field(default=None, metadata=NOT_TOKENS)
    split_trees = False  # whether each branch runs as a row of its own; see `SplitTrees`
    source = ""  # the origin of the data, in words; no field, because equal data is equal

    @classmethod
    def from_ids(cls, ids: object) -> TokenBatch:
        """Make rows of plain text from token ids.

        Args:
            ids: An int array or tensor [S, T]; sequences of ints, whose lengths may differ; a list
                of tensors [1, T] or [B, T]; or dict batches, such as a BatchEncoding or a data
                loader's, of input_ids, attention_mask (0 marks padding, which is left out) and
                labels (-100 marks a token that is no target; others are the tokens themselves, not
                shifted).

        Returns:
            One row a sequence. Every token but the first of its sequence is a target, unless a
            label says otherwise.

        Raises:
            InputError: No sequences, one of fewer than 2 tokens or without a target, or a value
                that holds no token ids.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
            >>> batch.num_rows, batch.num_tokens, batch.target_token.tolist()
            (2, 5, [6, 7, 8])
            >>> padded = {"input_ids": [[5, 6, 7, 0]], "attention_mask": [[1, 1, 1, 0]]}
            >>> fp.TokenBatch.from_ids(padded | {"labels": [[-100, -100, 7, -100]]}).target_token
            array([7])
        """
        rows = to_rows(ids)
        for i, row in enumerate(rows):
            if len(row.ids) < 2:
                raise InputError(
                    f"sequence {i} has {len(row.ids)} tokens; at least 2 are needed to predict one"
                )
            if not row.is_target.any():
                raise InputError(
                    f"sequence {i} has no target; one label after its first must not be -100"
                )
        return cls._from_trees(
            [[(ids, np.flatnonzero(is_target) - 1, ids[is_target])] for ids, is_target in rows]
        )

    @classmethod
    def from_continuations(cls, rows: Sequence[Sequence[tuple[Ids, int]]]) -> TokenBatch:
        """One tree per row from its sequences: (token ids, start); the tokens from `start` on are
        targets.

        The trunk is the longest common prefix of a row's sequences; each sequence's remainder is a
        branch. Raises InputError when there are no rows, or a sequence has no token before or none
        after its start.

        Examples:
            >>> import fastprune as fp
            >>> question = [([1, 2, 3, 7], 3), ([1, 2, 3, 8, 9], 3)]
            >>> batch = fp.TokenBatch.from_continuations([question])
            >>> batch.ids.tolist(), batch.branch.tolist()
            ([1, 2, 3, 7, 8, 9], [0, 0, 0, 1, 2, 2])
        """
        for r, sequences in enumerate(rows):
            for sequence, start in sequences:
                if not 1 <= start < len(sequence):
                    raise InputError(
                        f"row {r}: a continuation needs a token before it and one of its own"
                    )
        return cls._from_trees(
            [
                [(ids, np.arange(start - 1, len(ids) - 1), ids[start:]) for ids, start in sequences]
                for sequences in rows
            ]
        )

    @classmethod
    def from_predictions(cls, rows: Sequence[Sequence[tuple[Ids, Ids]]]) -> TokenBatch:
        """One tree per row from its sequences: (token ids, targets); the last ids predict the
        targets.

        The result of `from_continuations` on ids + targets[-1:], without running the last target,
        whose state predicts nothing: choices of one token each are one row without branches. Raises
        InputError when there are no rows, or more targets than tokens that could predict them.
        """
        for r, sequences in enumerate(rows):
            for ids, targets in sequences:
                if not 1 <= len(targets) <= len(ids):
                    raise InputError(
                        f"row {r}: {len(targets)} targets cannot be predicted by {len(ids)} tokens"
                    )
        return cls._from_trees(
            [
                [(ids, np.arange(len(ids) - len(t), len(ids)), t) for ids, t in sequences]
                for sequences in rows
            ]
        )

    @classmethod
    def _from_trees(cls, rows: Sequence[Sequence[tuple[Ids, np.ndarray, Ids]]]) -> TokenBatch:
        """One tree per row from its sequences: (token ids, predicting, targets), each target
        predicted at the place of the sequence that `predicting` has for it."""
        if not rows:
            raise InputError("the calibration set is empty")
        ids: list[Ids] = []
        positions: list[np.ndarray] = []
        branch: list[np.ndarray] = []
        row_starts = [0]
        continuation_row: list[int] = []
        sources: list[np.ndarray] = []
        tokens: list[Ids] = []
        continuations: list[np.ndarray] = []
        for r, sequences in enumerate(rows):
            trunk = common_prefix([s for s, *_ in sequences])
            base = row_starts[-1]
            ids.append(sequences[0][0][:trunk])
            positions.append(np.arange(trunk))
            branch.append(np.zeros(trunk))
            length = trunk
            for number, (sequence, predicting, targets) in enumerate(sequences, 1):
                tail = len(sequence) - trunk
                # index in the row of each token of this sequence
                place = base + np.concatenate([np.arange(trunk), length + np.arange(tail)])
                sources.append(place[predicting])
                tokens.append(targets)
                continuations.append(np.full(len(targets), len(continuation_row)))
                continuation_row.append(r)
                ids.append(sequence[trunk:])
                positions.append(np.arange(trunk, len(sequence)))
                branch.append(np.full(tail, number))
                length += tail
            row_starts.append(base + length)
        return cls(
            ids=_joined(ids),
            positions=_joined(positions),
            branch=_joined(branch),
            row_starts=np.asarray(row_starts),
            target_source=_joined(sources),
            target_token=_joined(tokens),
            target_continuation=_joined(continuations),
            continuation_row=np.asarray(continuation_row),
        )

    def __repr__(self) -> str:
        return (
            f"TokenBatch({self.num_rows} rows, {self.num_continuations} continuations, "
            f"{self.num_tokens} tokens)"
        )

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_continuations(self) -> int:
        return len(self.continuation_row)

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, int64[R]."""
        return np.diff(self.row_starts)

    @cached_property
    def read_tokens(self) -> np.ndarray:
        """Tokens that run for each row, padding left out, int64[R]: `row_lengths`, unless trees
        are split."""
        return self._as_it_runs[0]

    @cached_property
    def run_sizes(self) -> np.ndarray:
        """Places of the rectangle in which each row runs alone, padding included, int64[R]."""
        return self._as_it_runs[1]

    @cached_property
    def _as_it_runs(self) -> tuple[np.ndarray, np.ndarray]:
        read, sizes = self.row_lengths.copy(), self.row_lengths.copy()
        for row in np.flatnonzero(self.row_is_tree) if self.split_trees else ():
            branch = self.branch[self.row_starts[row] : self.row_starts[row + 1]]
            trunk, *tails = np.bincount(branch)
            tails = [tail for tail in tails if tail]  # one that ends with the trunk runs with it
            read[row] = len(tails) * trunk + sum(tails)
            sizes[row] = len(tails) * (trunk + max(tails))
        return read, sizes

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Targets of each continuation, int64[C]."""
        return np.bincount(self.target_continuation, minlength=self.num_continuations)

    @cached_property
    def row_is_tree(self) -> np.ndarray:
        """Whether each row has branches that must not see each other, bool[R]."""
        return np.maximum.reduceat(self.branch, self.row_starts[:-1]) > 0

    @cached_property
    def targets_by_row(self) -> list[np.ndarray]:
        """The targets of each row, in the order of their sources: R arrays of indices into the
        target arrays."""
        order = np.argsort(self.target_source, kind="stable")
        return np.split(order, np.searchsorted(self.target_source[order], self.row_starts[1:-1]))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of every array: equal for equal calibration data, whatever file it came from."""
        digest = hashlib.sha256()
        for item in fields(self):
            if item.metadata == NOT_TOKENS:
                continue
            array = np.ascontiguousarray(getattr(self, item.name), dtype="<i8")
            digest.update(f"{item.name}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def check_fits(self, vocab_size: int, max_positions: int | None) -> None:
        """Raise InputError for a token id outside the vocabulary or a sequence longer than the
        model's positions."""
        for name, ids in (("token", self.ids), ("target", self.target_token)):
            wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if len(wrong):
                raise InputError(
                    f"{name} id {ids[wrong[0]]} is outside the model's vocabulary (0 to "
                    f"{vocab_size - 1})"
                )
        longest = int(self.positions.max()) + 1
        if max_positions is not None and longest > max_positions:
            raise InputError(
                f"a sequence of {longest} tokens is longer than the model's {max_positions} "
                f"positions"
            )


@dataclass(frozen=True, repr=False)
class SplitTrees(TokenBatch):
    """The same rows for a model that cannot run trees: each branch runs as a row of its own, behind
    a copy of the trunk. The content, and its hash, are the same."""

    split_trees = True

    @classmethod
    def of(cls, batch: TokenBatch) -> SplitTrees:
        """The rows of a batch."""
        return cls(**{item.name: getattr(batch, item.name) for item in fields(batch)})


@dataclass(frozen=True, repr=False)
class Tasks:
    """Multiple-choice questions as token trees: one row per question, one continuation per choice.

    question [C]: the question of each choice, ascending. answer [Q]: the continuation of each
    correct choice. choice_characters, choice_bytes [C]: length of each choice's text in characters
    and in UTF-8 bytes, for length-normalised accuracy; the delimiter between prompt and choice does
    not count. source: the file or data set, for people.

    Examples:
        >>> import numpy as np
        >>> import fastprune as fp
        >>> question = [([1, 2, 3], 2), ([1, 2, 4, 5], 2)]  # the second is right
        >>> batch, lengths = fp.TokenBatch.from_continuations([question]), np.array([3, 8])
        >>> fp.Tasks(batch, np.array([0, 0]), np.array([1]), lengths, lengths)
        Tasks(1 questions, 2 choices, 5 tokens)
    """

    batch: TokenBatch
    question: np.ndarray
    answer: np.ndarray
    choice_characters: np.ndarray
    choice_bytes: np.ndarray
    source = ""  # no field, as that of TokenBatch

    def __repr__(self) -> str:
        return (
            f"Tasks({self.num_questions} questions, {len(self.question)} choices, "
            f"{self.batch.num_tokens} tokens)"
        )

    @property
    def num_questions(self) -> int:
        return len(self.answer)

    @cached_property
    def content_hash(self) -> str:
        digest = hashlib.sha256(self.batch.content_hash.encode())
        for array in (self.question, self.answer, self.choice_characters, self.choice_bytes):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()


def _joined(parts: Sequence[Ids]) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts]).astype(np.int64)


def common_prefix(sequences: Sequence[Ids]) -> int:
    """Length of the longest prefix that all sequences share."""
    shortest = min(map(len, sequences))
    stacked = np.stack([sequence[:shortest] for sequence in sequences])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest
