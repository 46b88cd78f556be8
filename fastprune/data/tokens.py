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
    """Rows of tokens, each row a tree.

    A tree is a trunk with branches. A branch sees the trunk and itself, and no other branch. Plain
    text is a trunk without branches. The choices of a question share the question as their trunk,
    which runs once. A target is a token whose probability counts. A continuation is a run of
    targets: a row of text has one, a question one for each choice.

    All arrays are int64, for R rows, C continuations, M targets and T tokens, one row after the
    other.

    Attributes:
        ids: [T], token ids.
        positions: [T], the position of each token in its own sequence.
        branch: [T], the branch of each token in its row; 0 is the trunk.
        row_starts: [R + 1], the index of the first token of each row, then T.
        target_source: [M], the index of the token whose state predicts each target.
        target_token: [M], the token id of each target.
        target_continuation: [M], the continuation of each target.
        continuation_row: [C], the row of each continuation.
        row_words: [R], words in the text of each row's targets; None for token ids.
        row_bytes: [R], UTF-8 bytes of that text; None for token ids.
        source: The file or data set in words, with the column that was read.

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
    source = ""  # no field: batches of equal tokens are equal, whatever their origin

    @classmethod
    def from_ids(cls, ids: object) -> TokenBatch:
        """Make rows of plain text from token ids.

        Args:
            ids: The ids, in one of these forms.

                - An int array or tensor [S, T], or a list of tensors [1, T] or [B, T].
                - Lists of ints, whose lengths may differ.
                - Dict batches, such as a BatchEncoding or those of a data loader, with input_ids
                  and possibly attention_mask and labels. A mask of 0 marks padding, which is left
                  out. A label of -100 marks a token that is no target; other labels repeat the
                  token itself, not the next one.

        Returns:
            A row for each sequence. Each token after the first is a target, unless its label is
            -100.

        Raises:
            InputError: The value holds no sequences or no token ids, or a sequence has fewer than
                2 tokens or no target.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_ids([[5, 6, 7], [5, 8]])
            >>> batch.num_rows, batch.num_tokens, batch.target_token.tolist()
            (2, 5, [6, 7, 8])
            >>> padded = {"input_ids": [[5, 6, 7, 0]], "attention_mask": [[1, 1, 1, 0]]}
            >>> labelled = padded | {"labels": [[-100, -100, 7, -100]]}
            >>> fp.TokenBatch.from_ids(labelled).target_token
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
        """Make a tree of each row's sequences.

        The trunk is the longest common prefix of a row's sequences. The remainder of each sequence
        is a branch.

        Args:
            rows: For each row its sequences as (token ids, start). Tokens from index start on are
                targets.

        Returns:
            A row for each tree, with a continuation for each sequence.

        Raises:
            InputError: There are no rows, or a sequence has no token before or after its start.

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
        """Make a tree of each row's sequences, without running their last targets.

        The result equals that of `from_continuations` on ids + targets[-1:]. The state of a last
        target predicts nothing, so it need not run. Choices of one token each become one row
        without branches.

        Args:
            rows: For each row its sequences as (token ids, targets). The last ids predict the
                targets.

        Returns:
            A row for each tree, with a continuation for each sequence.

        Raises:
            InputError: There are no rows, or more targets than tokens that could predict them.

        Examples:
            >>> import fastprune as fp
            >>> batch = fp.TokenBatch.from_predictions([[([1, 2, 3], [7]), ([1, 2, 3], [8])]])
            >>> batch.ids.tolist(), batch.target_token.tolist()
            ([1, 2, 3], [7, 8])
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
        """Make a tree of each row's sequences (token ids, sources, targets).

        The state at sources[i] of the sequence predicts targets[i].
        """
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
            for number, (sequence, own_sources, targets) in enumerate(sequences, 1):
                tail = len(sequence) - trunk
                # the index in the batch of each token of this sequence; for [1, 2, 3, 7] and
                # [1, 2, 3, 8, 9] as the first row: 0 1 2 3, then 0 1 2 4 5
                index = base + np.concatenate([np.arange(trunk), length + np.arange(tail)])
                sources.append(index[own_sources])
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
        """R."""
        return len(self.row_starts) - 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def num_continuations(self) -> int:
        """C."""
        return len(self.continuation_row)

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, int64[R]."""
        return np.diff(self.row_starts)

    @cached_property
    def read_tokens(self) -> np.ndarray:
        """Tokens that run for each row, without padding, int64[R].

        They are `row_lengths` unless trees are split.
        """
        return self._run_counts[0]

    @cached_property
    def run_sizes(self) -> np.ndarray:
        """Positions that run for each row when it runs alone, with padding, int64[R]."""
        return self._run_counts[1]

    @cached_property
    def _run_counts(self) -> tuple[np.ndarray, np.ndarray]:
        read, sizes = self.row_lengths.copy(), self.row_lengths.copy()
        for row in np.flatnonzero(self.row_is_tree) if self.split_trees else ():
            branch = self.branch[self.row_starts[row] : self.row_starts[row + 1]]
            trunk, *tails = np.bincount(branch)
            tails = [tail for tail in tails if tail]  # an empty branch runs with the trunk
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
        """The targets of each row as R arrays of their indices, in the order of their sources."""
        order = np.argsort(self.target_source, kind="stable")
        return np.split(order, np.searchsorted(self.target_source[order], self.row_starts[1:-1]))

    @cached_property
    def content_hash(self) -> str:
        """The SHA-256 of all arrays, equal for equal calibration data, whatever its file."""
        digest = hashlib.sha256()
        for item in fields(self):
            if item.metadata == NOT_TOKENS:
                continue
            array = np.ascontiguousarray(getattr(self, item.name), dtype="<i8")
            digest.update(f"{item.name}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def check_fits(self, vocab_size: int, max_positions: int | None) -> None:
        """Check that a model can run the rows.

        Args:
            vocab_size: The size of its vocabulary.
            max_positions: The number of its positions; None for no limit.

        Raises:
            InputError: A token id is outside the vocabulary, or a sequence is longer than the
                model's positions.

        Examples:
            >>> import fastprune as fp
            >>> fp.TokenBatch.from_ids([[5, 6, 7]]).check_fits(vocab_size=8, max_positions=None)
        """
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
    """The same rows for a model that cannot run trees.

    Each branch runs as a row of its own, after a copy of the trunk. The content and its hash are
    those of the batch.
    """

    split_trees = True

    @classmethod
    def of(cls, batch: TokenBatch) -> SplitTrees:
        """The rows of a batch."""
        return cls(**{item.name: getattr(batch, item.name) for item in fields(batch)})


@dataclass(frozen=True, repr=False)
class Tasks:
    """Multiple-choice questions as token trees: a row for each question.

    All arrays are int64, for Q questions with C choices in all.

    Attributes:
        batch: The rows, with a continuation for each choice.
        question: [C], the question of each choice, ascending.
        answer: [Q], the continuation of each question's right choice.
        choice_characters: [C], the length of each choice's text in characters, for
            length-normalised accuracy. The delimiter between prompt and choice does not count.
        choice_bytes: [C], the length in UTF-8 bytes.
        source: The file or data set in words.

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
    source = ""  # no field, as in TokenBatch

    def __repr__(self) -> str:
        return (
            f"Tasks({self.num_questions} questions, {len(self.question)} choices, "
            f"{self.batch.num_tokens} tokens)"
        )

    @property
    def num_questions(self) -> int:
        """Q."""
        return len(self.answer)

    @cached_property
    def content_hash(self) -> str:
        """The SHA-256 of all arrays, equal for equal questions, whatever their file."""
        digest = hashlib.sha256(self.batch.content_hash.encode())
        for array in (self.question, self.answer, self.choice_characters, self.choice_bytes):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()


def _joined(parts: Sequence[Ids]) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts]).astype(np.int64)


def common_prefix(sequences: Sequence[Ids]) -> int:
    """The length of the longest prefix that all sequences share."""
    shortest = min(map(len, sequences))
    stacked = np.stack([sequence[:shortest] for sequence in sequences])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest
