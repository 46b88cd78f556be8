"""Token trees, and the loaders of text, token ids and questions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers_for_tests import make_tokenizer

import fastprune as fp


def row_of(batch: fp.TokenBatch, row: int) -> slice:
    return slice(batch.row_starts[row], batch.row_starts[row + 1])


def unpack(batch: fp.TokenBatch) -> list[list[tuple[list[int], int]]]:
    """The (sequence, first target) pairs that a batch holds, read off its arrays: the inverse of
    from_continuations."""
    rows = [[] for _ in range(batch.num_rows)]
    for continuation, row in enumerate(batch.continuation_row):
        targets = batch.target_continuation == continuation
        sources, tokens = batch.target_source[targets], batch.target_token[targets]
        last = sources[-1]  # the path to the last source, and then the last target
        place = np.arange(batch.num_tokens)
        path = np.flatnonzero(
            (place >= batch.row_starts[row])
            & (place <= last)
            & ((batch.branch == 0) | (batch.branch == batch.branch[last]))
        )
        path = path[np.argsort(batch.positions[path])]
        assert batch.positions[path].tolist() == list(range(len(path)))
        sequence = [*batch.ids[path].tolist(), int(tokens[-1])]
        start = int(batch.positions[sources[0]]) + 1
        assert sequence[start:] == tokens.tolist()
        assert batch.positions[sources].tolist() == list(range(start - 1, len(sequence) - 1))
        rows[row].append((sequence, start))
    return rows


def random_tree(rng) -> list[tuple[np.ndarray, int]]:
    """Sequences over a tiny alphabet, so that they often share more than their prompt."""
    prompt = rng.integers(0, 3, rng.integers(1, 9))
    return [
        (np.concatenate([prompt, rng.integers(0, 2, rng.integers(1, 6))]), len(prompt))
        for _ in range(rng.integers(1, 6))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_trees_hold_their_sequences(seed):
    rng = np.random.default_rng(seed)
    rows = [random_tree(rng) for _ in range(rng.integers(1, 7))]
    batch = fp.TokenBatch.from_continuations(rows)
    assert unpack(batch) == [[(ids.tolist(), start) for ids, start in row] for row in rows]
    assert batch.num_rows == len(rows)
    assert batch.num_continuations == sum(map(len, rows))
    assert batch.target_counts.tolist() == [len(ids) - start for row in rows for ids, start in row]
    assert batch.row_lengths.sum() == batch.num_tokens == len(batch.positions) == len(batch.branch)
    for r, row in enumerate(rows):
        sequences = [ids.tolist() for ids, _ in row]
        shared = 0
        while all(len(s) > shared and s[shared] == sequences[0][shared] for s in sequences):
            shared += 1
        branch = batch.branch[row_of(batch, r)]
        assert (branch == 0).sum() == shared
        assert len(branch) == shared + sum(
            len(s) - shared for s in sequences
        )  # the trunk stands once
        assert batch.row_is_tree[r] == (len(branch) > shared)


@pytest.mark.parametrize("seed", range(20))
def test_predictions_are_continuations_whose_last_token_is_not_run(seed):
    rng = np.random.default_rng(seed)
    rows = [random_tree(rng) for _ in range(rng.integers(1, 7))]
    batch = fp.TokenBatch.from_predictions(
        [[(ids[:-1], ids[start:]) for ids, start in row] for row in rows]
    )
    assert unpack(batch) == [[(ids.tolist(), start) for ids, start in row] for row in rows]
    whole = fp.TokenBatch.from_continuations(rows)
    assert (batch.row_lengths < whole.row_lengths).all()
    assert batch.target_token.tolist() == whole.target_token.tolist()


def test_choices_of_one_token_are_no_tree():
    batch = fp.TokenBatch.from_predictions([[([7, 8], [4]), ([7, 8], [5]), ([7, 8], [4])]])
    assert batch.ids.tolist() == [7, 8]
    assert not batch.row_is_tree.any()
    assert unpack(batch) == [[([7, 8, 4], 2), ([7, 8, 5], 2), ([7, 8, 4], 2)]]


@pytest.mark.parametrize(("ids", "targets"), [([1], []), ([], [1]), ([1], [2, 3])])
def test_predictions_that_cannot_be(ids, targets):
    with pytest.raises(
        fp.InputError,
        match=rf"row 1: {len(targets)} targets cannot be predicted by {len(ids)} tokens",
    ):
        fp.TokenBatch.from_predictions([[([1], [2])], [(ids, targets)]])


def test_all_arrays_are_int64():
    batch = fp.TokenBatch.from_continuations([[([1, 2, 3], 1), ([1, 5], 1)]])
    counts_of_text = {"row_words", "row_bytes"}  # of a batch made from text
    names = batch.__dataclass_fields__.keys() - counts_of_text
    arrays = {name: getattr(batch, name) for name in names}
    assert {name: array.dtype.name for name, array in arrays.items()} == dict.fromkeys(
        arrays, "int64"
    )
    for name, array in arrays.items():
        assert replace(batch, **{name: array + 1}).content_hash != batch.content_hash, name


def test_a_sequence_that_another_begins_with():
    batch = fp.TokenBatch.from_continuations([[([7, 8, 4], 2), ([7, 8, 4, 2], 2)]])
    assert batch.ids.tolist() == [7, 8, 4, 2]
    assert batch.branch.tolist() == [0, 0, 0, 2]
    assert unpack(batch) == [[([7, 8, 4], 2), ([7, 8, 4, 2], 2)]]


@pytest.mark.parametrize("as_type", [list, np.array, torch.tensor])
def test_from_ids(as_type):
    ids = [[3, 1, 4], [1, 5, 9]]
    batch = fp.TokenBatch.from_ids(as_type(ids))
    assert unpack(batch) == [[(row, 1)] for row in ids]
    assert not batch.row_is_tree.any()
    assert (batch.branch == 0).all()


def test_from_ids_of_different_lengths():
    ids = [[3, 1], [1, 5, 9, 2, 6], [5, 3, 5]]
    batch = fp.TokenBatch.from_ids([np.array(ids[0]), ids[1], torch.tensor(ids[2])])
    assert unpack(batch) == [[(row, 1)] for row in ids]
    assert batch.row_lengths.tolist() == [2, 5, 3]
    assert batch.num_tokens == 10  # nothing is padded


@pytest.mark.parametrize(
    ("ids", "culprit"),
    [
        ([], "empty"),
        (np.zeros((0, 5), dtype=int), "empty"),
        ([[1, 2], [3]], "sequence 1 has 1 tokens"),
        ([[1, 2], []], "sequence 1 has 0 tokens"),
        ([[1.5, 2.0]], "sequence 0 must be integer"),
        (["ab", "cd"], "sequence 0 must be integer"),
        (np.arange(4), r"shape \[S, T\], not \[4\]"),
        (np.zeros((2, 2, 2), dtype=int), r"not \[2, 2, 2\]"),
        ([[[1, 2]]], "sequence 0 must be integer"),
        ([1, 2, 3], r"for one sequence, pass \[ids\]"),
    ],
)
def test_refused_ids(ids, culprit):
    with pytest.raises(fp.InputError, match=culprit) as caught:
        fp.TokenBatch.from_ids(ids)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [0, 3, 4, -1])
def test_refused_starts(start):
    with pytest.raises(fp.InputError, match="row 1: a continuation needs"):
        fp.TokenBatch.from_continuations([[([1, 2], 1)], [([1, 2, 3], start)]])


def test_content_hash_tells_contents_apart():
    base = [[([1, 2, 3, 4], 2), ([1, 2, 5], 2)], [([6, 7], 1)]]
    others = [
        [[([1, 2, 3, 9], 2), ([1, 2, 5], 2)], [([6, 7], 1)]],  # another token
        [[([1, 2, 3, 4], 1), ([1, 2, 5], 2)], [([6, 7], 1)]],  # another target
        [[([1, 2, 5], 2), ([1, 2, 3, 4], 2)], [([6, 7], 1)]],  # another order
        [[([1, 2, 3, 4], 2)], [([1, 2, 5], 2)], [([6, 7], 1)]],  # the same sequences, not packed
    ]
    hashes = [fp.TokenBatch.from_continuations(rows).content_hash for rows in (base, base, *others)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 1 + len(others)


# -- text ------------------------------------------------------------------------------------------

TEXT = " ".join(f"the sum of {i} and 4 is {i + 4}." for i in range(120))


def windows_of(batch: fp.TokenBatch) -> list[tuple[int, ...]]:
    return [tuple(batch.ids[row_of(batch, r)].tolist()) for r in range(batch.num_rows)]


def test_text_windows(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    stream = make_tokenizer()(TEXT)["input_ids"]
    every = [tuple(stream[i : i + 17]) for i in range(0, len(stream) - 16, 17)]
    assert len(set(every)) == len(every) > 20
    draws = set()
    for seed in range(4):
        windows = windows_of(
            fp.load_text(path, make_tokenizer(), num_samples=7, seq_len=17, seed=seed, bos=False)
        )
        places = [every.index(window) for window in windows]
        assert places == sorted(set(places))  # without replacement, in file order
        assert len(places) == 7
        draws.add(tuple(places))
    assert len(draws) > 1
    whole = fp.load_text(path, make_tokenizer(), len(every), seq_len=17, seed=3, bos=False)
    assert windows_of(whole) == every
    assert (
        fp.load_text(path, make_tokenizer(), seq_len=17, seed=3).num_rows == 64
    )  # where nothing is said
    longer = fp.load_text(path, make_tokenizer(), seq_len=40, bos=False)
    assert longer.num_rows == len(stream) // 40 < 64  # all of a text that has fewer


def test_the_same_seed_gives_the_same_hash_from_any_file_form(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT, "id": 3}) + "\n\n")
    first, second = (
        fp.load_text(tmp_path / name, make_tokenizer(), num_samples=5, seq_len=11, seed=1)
        for name in ("a.txt", "a.jsonl")
    )
    assert first.content_hash == second.content_hash
    np.save(tmp_path / "ids.npy", np.array(windows_of(first), dtype=np.uint16))
    save_file(
        {"input_ids": np.array(windows_of(first), dtype=np.int32)}, tmp_path / "ids.safetensors"
    )
    for name in ("ids.npy", "ids.safetensors"):
        assert fp.load_text(str(tmp_path / name)).content_hash == first.content_hash
    assert fp.TokenBatch.from_ids(windows_of(first)).content_hash == first.content_hash
    other = fp.load_text(tmp_path / "a.txt", make_tokenizer(), num_samples=5, seq_len=11, seed=2)
    assert other.content_hash != first.content_hash


def test_documents_are_encoded_one_by_one_and_joined_in_order(tmp_path):
    documents = [TEXT[:300], TEXT[300:310], TEXT[310:]]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    tokenizer = make_tokenizer()
    stream = [token for document in documents for token in tokenizer(document)["input_ids"]]
    assert stream.count(tokenizer.bos_token_id) == 3
    count = len(stream) // 13
    batch = fp.load_text(path, tokenizer, num_samples=count, seq_len=13, bos=False)
    assert [token for window in windows_of(batch) for token in window] == stream[: count * 13]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_token_id_files(tmp_path, suffix):
    path = tmp_path / f"ids{suffix}"
    ids = np.random.default_rng(0).integers(0, 1000, (9, 15))
    np.save(path, ids) if suffix == ".npy" else save_file({"ids": ids}, path)
    assert windows_of(fp.load_text(path)) == [tuple(row) for row in ids.tolist()]
    batch = fp.load_text(path, num_samples=4, seq_len=6, seed=5)
    places = [ids[:, :6].tolist().index(list(window)) for window in windows_of(batch)]
    assert places == sorted(set(places))
    assert len(places) == 4


@pytest.mark.parametrize(
    ("name", "content", "options", "culprit"),
    [
        ("empty.txt", b"", {}, "holds no text"),
        ("blank.txt", b" \n\t\n", {}, "holds no text"),
        ("empty.jsonl", b"", {}, "holds no text"),
        ("rows.jsonl", b'{"text": "a"}\n{"txt": "a"}\n', {}, "rows.jsonl:2: expected a row"),
        ("rows.jsonl", b'["a"]\n', {}, "rows.jsonl:1: expected a row"),
        ("rows.jsonl", b'{"text": \n', {}, "rows.jsonl:1: not valid JSON"),
        (
            "short.txt",
            b"the sum of 4",
            {"num_samples": 2, "seq_len": 50},
            "holds 0 windows of 50 tokens, but 2",
        ),
        (
            "short.txt",
            b"1" * 30,
            {"num_samples": 4, "seq_len": 9},
            "what fits: num_samples=3 or seq_len=7",
        ),
        (
            "short.txt",
            b"12",
            {"num_samples": 4, "seq_len": 9},
            "a longer text .this one has 3 tokens",
        ),
        ("latin.txt", b"caf\xe9 " * 50, {"num_samples": 2, "seq_len": 5}, "latin.txt"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', {"num_samples": 2, "seq_len": 5}, "latin.jsonl"),
        ("text.pdf", b"a,b", {}, "read from .txt, .jsonl, .json, .csv, .parquet, .npy and .safet"),
        ("ids.npy", b"", {}, "not a readable .npy"),
        ("ids.npy", b"nonsense", {}, "not a readable .npy"),
        ("ids.safetensors", b"nonsense", {}, "not a readable .safetensors"),
    ],
)
def test_refused_text_files(tmp_path, name, content, options, culprit):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(fp.InputError, match=culprit) as caught:
        fp.load_text(tmp_path / name, make_tokenizer(), **options)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "options", "culprit"),
    [
        (np.zeros((2, 3)), {}, "must be an integer array"),
        (np.zeros(5, dtype=int), {}, r"\[S, T\]"),
        (np.zeros((0, 5), dtype=int), {}, "holds no token ids"),
        (np.zeros((3, 5), dtype=int), {"num_samples": 4}, "holds 3 sequences, but 4"),
        (
            np.zeros((3, 5), dtype=int),
            {"seq_len": 6},
            "have 5 tokens, fewer than the 6 asked for; what fits: seq_len=5",
        ),
        (np.zeros((3, 1), dtype=int), {}, "1 tokens"),
        (np.array([[{}]], dtype=object), {}, "not a readable .npy"),
    ],
)
def test_refused_token_id_arrays(tmp_path, array, options, culprit):
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    with pytest.raises(fp.InputError, match=culprit):
        fp.load_text(tmp_path / "ids.npy", **options)


def test_refused_text_arguments(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(fp.InputError, match="no such calibration file"):
        fp.load_text(tmp_path / "b.txt", make_tokenizer())
    with pytest.raises(fp.InputError, match="no such calibration file"):
        fp.load_text(tmp_path, make_tokenizer())
    with pytest.raises(fp.InputError, match="needs a tokenizer"):
        fp.load_text(tmp_path / "a.txt")
    for name, value in [
        ("num_samples", 0),
        ("num_samples", 1.5),
        ("seq_len", 1),
        ("seq_len", True),
    ]:
        with pytest.raises(fp.InputError, match=f"{name} must be an integer"):
            fp.load_text(tmp_path / "a.txt", make_tokenizer(), **{name: value})
    save_file(
        {"a": np.zeros((2, 2), int), "b": np.zeros((2, 2), int)}, tmp_path / "two.safetensors"
    )
    with pytest.raises(fp.InputError, match="one tensor"):
        fp.load_text(tmp_path / "two.safetensors")


# -- questions -------------------------------------------------------------------------------------

QUESTIONS = [
    {"prompt": "the sum of 4 and 4 is", "choices": [" 8", " 4", " 42", " blue sea"], "answer": 0},
    {"prompt": "the sea is ", "choices": ["blue", "the sum"], "answer": 1},
    {"prompt": "what is the sum?\n\n", "choices": ["it is 8", "8", "it"], "answer": 2},
    {"prompt": "the sky is \t ", "choices": [" blue", "blué"], "answer": 0},
    {"prompt": "the s", "choices": ["um of 4", "ee it", "o"], "answer": 1, "delimiter": ""},
    {"prompt": "the sum\n", "choices": ["\n\nis 8", "\nis 4"], "answer": 1, "delimiter": "\n"},
]


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness's rule, as its TemplateLM writes it."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole = tokenizer.encode(context + continuation)
    context_ids = tokenizer.encode(context)
    return context_ids, whole[len(context_ids) :]


def write_tasks(path, rows) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


@pytest.mark.parametrize("adds_bos", [True, False])
def test_questions_are_split_as_the_harness_does(tmp_path, adds_bos):
    tokenizer = make_tokenizer(adds_bos)
    write_tasks(tmp_path / "tasks.jsonl", QUESTIONS)
    tasks = fp.load_tasks(tmp_path / "tasks.jsonl", tokenizer)
    found = unpack(tasks.batch)
    assert tasks.num_questions == len(found) == len(QUESTIONS)
    number = 0
    for q, (question, sequences) in enumerate(zip(QUESTIONS, found, strict=True)):
        assert tasks.answer[q] == number + question["answer"]
        for choice, (sequence, start) in zip(question["choices"], sequences, strict=True):
            delimiter = question.get("delimiter", " ")
            choice = choice.removeprefix(delimiter)
            _, continuation = encode_pair(tokenizer, question["prompt"], delimiter + choice)
            assert sequence[start:] == continuation, (question, choice)
            text = question["prompt"] + delimiter + choice
            assert tokenizer.decode(sequence, skip_special_tokens=True) == text
            assert tasks.question[number] == q
            assert tasks.choice_characters[number] == len(choice)
            assert tasks.choice_bytes[number] == len(choice.encode())
            number += 1
    assert number == len(tasks.question)


def test_the_choices_4_and_42_share_their_first_token(tmp_path):
    tokenizer = make_tokenizer()
    four, forty_two = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" 4", " 42")
    )
    assert (len(four), len(forty_two)) == (1, 2)
    assert forty_two[:1] == four
    write_tasks(
        tmp_path / "tasks.jsonl", [{"prompt": "the sum is", "choices": [" 42", " 4"], "answer": 0}]
    )
    tasks = fp.load_tasks(tmp_path / "tasks.jsonl", tokenizer)
    assert tasks.batch.target_counts.tolist() == [2, 1]
    assert tasks.batch.num_tokens == len(tokenizer("the sum is 42")["input_ids"])
    ((long, start), (short, _)) = unpack(tasks.batch)[0]
    assert (long[start:], short[start:]) == (forty_two, four)


def test_limit_and_hash(tmp_path):
    path = tmp_path / "tasks.jsonl"
    write_tasks(path, QUESTIONS)
    whole = fp.load_tasks(path, make_tokenizer())
    some = fp.load_tasks(path, make_tokenizer(), limit=2)
    assert some.num_questions == 2
    assert unpack(some.batch) == unpack(whole.batch)[:2]
    assert (
        fp.load_tasks(path, make_tokenizer(), limit=99).content_hash
        == whole.content_hash
        != some.content_hash
    )
    with pytest.raises(fp.InputError, match="tokenizer must be one of transformers"):
        fp.load_tasks(path, "demo")
    for wrong in (3, None, b"some text"):
        with pytest.raises(fp.InputError, match="data must be a path"):
            fp.load_text(wrong, make_tokenizer())
    with pytest.raises(fp.InputError, match="these are questions, for objectives such as margin"):
        fp.load_text(path, make_tokenizer())
    write_tasks(path, [QUESTIONS[0] | {"answer": 1}, *QUESTIONS[1:]])
    assert fp.load_tasks(path, make_tokenizer()).content_hash != whole.content_hash


GOOD = '{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n'


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ("", "holds no questions"),
        (GOOD + '{"prompt": "a", "choices": [], "answer": 0}\n', ":2: choices must be"),
        (GOOD + '{"prompt": "a", "answer": 0}\n', ":2: choices must be"),
        (GOOD + '{"prompt": "a", "choices": "bc", "answer": 0}\n', ":2: choices must be"),
        ('{"prompt": "a", "choices": ["b", 3], "answer": 0}\n', ":1: choices must be"),
        ('{"prompt": "a", "choices": ["b", " "], "answer": 0}\n', ":1: choices must be"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}\n', ":1: a question needs at least 2"),
        (
            GOOD + '{"prompt": "a", "choices": ["b", "c"], "answer": 2}\n',
            ":2: answer must be .* 0 to 1, not 2",
        ),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": -1}\n', ":1: answer must be .* not -1"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "b"}\n', ":1: answer must be"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}\n', ":1: answer must be"),
        ('{"prompt": "a", "choices": ["b", "c"]}\n', ":1: answer must be .* not None"),
        ('{"choices": ["b", "c"], "answer": 0}\n', ":1: expected a row"),
        ("[1]\n", ":1: expected a row"),
        ("{\n", ":1: not valid JSON"),
    ],
)
def test_refused_task_rows(tmp_path, content, culprit):
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    with pytest.raises(fp.InputError, match=culprit) as caught:
        fp.load_tasks(path, make_tokenizer())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_task_arguments(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "", "choices": ["b", "c"], "answer": 0}\n')
    with pytest.raises(fp.InputError, match="no such task file"):
        fp.load_tasks(tmp_path / "nowhere.jsonl", make_tokenizer())
    (tmp_path / "tasks.csv").write_text(GOOD)
    with pytest.raises(fp.InputError, match=r"\.jsonl"):
        fp.load_tasks(tmp_path / "tasks.csv", make_tokenizer())
    with pytest.raises(fp.InputError, match="need a tokenizer"):
        fp.load_tasks(path, None)
    with pytest.raises(fp.InputError, match="limit"):
        fp.load_tasks(path, make_tokenizer(), limit=0)
    with pytest.raises(fp.InputError, match=":1: the prompt is empty"):
        fp.load_tasks(path, make_tokenizer(adds_bos=False))
    assert fp.load_tasks(path, make_tokenizer()).num_questions == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    seen = []

    def tokenizer(documents, **options):
        seen.extend(documents)
        return {"input_ids": [[1, 2, 3] for _ in documents]}

    text = "abc" if name == "a.txt" else '{"text": "abc"}\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    fp.load_text(tmp_path / name, tokenizer, num_samples=1, seq_len=2)
    assert seen == ["abc"]
