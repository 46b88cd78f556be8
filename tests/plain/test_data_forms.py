"""Every form of data that a loader takes, and for each the error of a wrong one."""

import gzip
import json
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import processors
from tokenizers_for_tests import make_tokenizer
from transformers import PreTrainedTokenizerFast

import fastprune as fp

TEXTS = [f"the sum of {i} and 4 is {i + 4}. the sea is blue." for i in range(12)]
ROWS = [{"id": f"n{i}", "text": text} for i, text in enumerate(TEXTS)]
SIZE = {"num_samples": 5, "seq_len": 12}


def load(data, **options) -> fp.TokenBatch:
    return fp.load_text(data, make_tokenizer(), **(SIZE | options))


def refused(call, *args, **options) -> str:
    """The message of the InputError that the call raises: one line."""
    with pytest.raises(fp.InputError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def expected() -> str:
    return load(TEXTS).content_hash


# -- texts -----------------------------------------------------------------------------------------


def test_lists_of_strings(expected):
    assert load(tuple(TEXTS)).content_hash == expected
    assert load(np.array(TEXTS)).content_hash == expected
    assert load(["", *TEXTS, ""]).content_hash == expected  # an empty text is none
    assert load(ROWS).content_hash == expected
    stream = [token for text in TEXTS for token in make_tokenizer()(text)["input_ids"]]
    batch = load(TEXTS, num_samples=None, bos=False)
    assert batch.ids.tolist() == stream[: len(stream) // 12 * 12]
    assert "data[1]: expected a row" in refused(load, ["a", 3])
    assert "holds no text" in refused(load, ["", " "])
    assert "holds no text" in refused(load, [])


def test_a_text_is_no_path():
    for text in (" ".join(TEXTS), "4" * 9999):
        assert "texts are given as a list of strings" in refused(load, text)
    assert "no such calibration file" in refused(load, "the sea")


def test_data_frames_and_their_columns(expected):
    frame = pd.DataFrame(ROWS)
    assert load(frame).content_hash == expected
    assert load(frame["text"]).content_hash == expected
    renamed = frame.rename(columns={"text": "body"})
    batch = load(renamed, column="body")
    assert batch.content_hash == expected
    assert batch.source == "DataFrame, column body"
    message = refused(load, renamed)
    assert "its fields are id, body; what fits: column=body" in message
    assert "DataFrame: row 3" in refused(load, pd.DataFrame({"text": ["a", "b", None]}))


def test_data_sets(expected):
    data = datasets.Dataset.from_list(ROWS)
    assert load(data).content_hash == expected
    assert load(data.to_iterable_dataset()).content_hash == expected
    several = datasets.DatasetDict(train=data, test=data)
    assert load(several["test"]).content_hash == expected
    message = "one split of a data set; those of this one are train, test; such as data['train']"
    assert message in refused(load, several)


def test_values_that_are_almost_a_known_form():
    columns = {"text": ["w1 w2", "w3"], "id": [1, 2]}
    message = "one column of a dict of columns, such as data['text'], or a list of rows; its"
    assert message in refused(load, columns)
    conversation = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    assert 'a conversation is a row like {"messages": [...]}' in refused(load, [conversation])
    assert "; texts are given as a list of strings" in refused(load, "some words of a text")
    assert "not text; load_text reads text" in refused(fp.TokenBatch.from_ids, ["w1 w2", "w3"])


def test_questions_in_the_place_of_text():
    for form, row in {"ARC": ARC, "MMLU": MMLU, "HellaSwag": HELLASWAG}.items():
        assert f"these are questions of the form {form}, for objectives" in refused(load, [row])
    assert "the row's fields are prompt, completion" in refused(
        fp.load_tasks, [{"prompt": "w1", "completion": "w2"}], make_tokenizer()
    )


def test_data_set_folders(tmp_path, expected):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    other = datasets.Dataset.from_list(ROWS[::-1])
    datasets.DatasetDict(train=other, test=data).save_to_disk(tmp_path / "splits")
    batch = load(tmp_path / "one")
    assert batch.content_hash == expected
    assert batch.source == f"{tmp_path}/one, column text"
    assert load(f"{tmp_path}/splits:test").content_hash == expected
    for name in ("splits", "splits:dev"):
        message = refused(load, f"{tmp_path}/{name}")
        assert f"name one of the splits train, test, such as {tmp_path}/splits:train" in message
    assert "no splits; leave out 'test'" in refused(load, f"{tmp_path}/one:test")
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "not a readable data set folder" in refused(load, tmp_path / "one")
    (tmp_path / "empty").mkdir()
    assert "no such calibration file; the folder" in refused(load, tmp_path / "empty")


def test_data_sets_of_the_hub(monkeypatch, expected):
    asked = []

    def load_dataset(path, name=None, *, split=None, streaming=False):
        asked.append((path, name, split, streaming))
        if path == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing'\ndoesn't exist on the Hub")
        data = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
        return data if split else datasets.IterableDatasetDict(train=data, test=data)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    batch = load("allenai/c4:en:validation")
    assert batch.content_hash == expected
    assert batch.source == "allenai/c4:en:validation, column text"
    for name in ("some/texts:test", "some/texts::test", "wikitext:wikitext-2-raw-v1:test"):
        assert load(name).content_hash == expected
    assert asked == [
        ("allenai/c4", "en", "validation", True),
        ("some/texts", None, "test", True),
        ("some/texts", None, "test", True),
        ("wikitext", "wikitext-2-raw-v1", "test", True),
    ]
    message = refused(load, "some/texts")
    assert "name one of the splits train, test, such as some/texts:train" in message
    message = refused(load, "nobody/nothing")
    assert "no such file, and not opened as a data set NAME:CONFIG:SPLIT" in message
    assert "no such calibration file" in refused(load, "nowhere/texts.jsonl")


def test_parquet_files(tmp_path, expected):
    path = tmp_path / "rows.parquet"
    pd.DataFrame(ROWS).to_parquet(path)
    assert load(path).content_hash == expected
    assert f"{path}: row 1" in refused(load, path, column="body")
    path.write_bytes(path.read_bytes()[:-9])
    assert "not a readable .parquet file" in refused(load, path)


def test_csv_files(tmp_path, expected):
    path = tmp_path / "rows.csv"
    rows = [*ROWS[:-1], {"id": "long", "text": "4" * 200_000}]  # above the default limit of csv
    pd.DataFrame(ROWS).to_csv(path, index=False)
    assert load(path).content_hash == expected
    pd.DataFrame(rows).to_csv(path, index=False)
    assert load(path, num_samples=1000).num_rows == 1000
    path.write_text("id,body\nn0,a sum\n")
    message = refused(load, path)
    assert f"{path}:2: expected a row" in message
    assert "its fields are id, body; what fits: column=body" in message
    path.write_text('text\n"a "quoted" text"\n')
    assert "not a readable .csv file" in refused(load, path)
    path.write_bytes(b"text\ncaf\xe9\n")
    assert "not a text file in UTF-8" in refused(load, path)


def test_json_files(tmp_path, expected):
    path = tmp_path / "rows.json"
    for value in (ROWS, TEXTS, {"version": 1, "data": ROWS}):
        path.write_text(json.dumps(value))
        assert load(path).content_hash == expected
    path.write_text(json.dumps([{"text": "a"}, {"text": 3}]))
    assert f"{path}: row 2: expected a row" in refused(load, path)
    path.write_text('{"version": 1}')
    assert "expected a list of rows" in refused(load, path)
    path.write_text("[1,")
    assert "not valid JSON" in refused(load, path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_gzip_files(tmp_path, suffix, expected):
    plain = {
        ".txt": "\n".join(TEXTS),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        ".json": json.dumps(ROWS),
        ".csv": pd.DataFrame(ROWS).to_csv(index=False),
    }[suffix]
    path = tmp_path / f"rows{suffix}.gz"
    path.write_bytes(gzip.compress(plain.encode()))
    batch = load(path)
    assert suffix == ".txt" or batch.content_hash == expected
    path.write_bytes(gzip.compress(plain.encode())[:-20])
    assert f"{path}: not a readable .gz file" in refused(load, path)


def test_zstandard_files(tmp_path, expected):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "rows.jsonl.zst"
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path.write_bytes(zstandard.compress(content))
    assert load(path).content_hash == expected
    path.write_bytes(b"nonsense")
    assert "not a readable .zst file" in refused(load, path)
    path.write_bytes(zstandard.compress(b'{"text": \n'))
    assert f"{path}:1: not valid JSON" in refused(load, path)


def test_a_small_file_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "rows.txt.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(70):
            file.write(bytes(2**20))
    assert "expands to more than 67,108,864 bytes" in refused(load, path)


@pytest.mark.parametrize(
    ("library", "name"),
    [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet"), ("datasets", "some/texts:test")],
)
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, library, name):
    monkeypatch.setitem(sys.modules, library, None)
    path = name if library == "datasets" else tmp_path / name
    if library != "datasets":
        path.write_bytes(b"")
    message = refused(load, path)
    assert message.startswith(f"{library} is needed")
    assert message.endswith("pip install 'fastprune[data]'")


# -- token ids -------------------------------------------------------------------------------------


def ids_of(batch: fp.TokenBatch) -> list[list[int]]:
    return [part.tolist() for part in np.split(batch.ids, batch.row_starts[1:-1])]


def test_batches_of_a_tokenizer():
    tokenizer = make_tokenizer()
    ragged = tokenizer(TEXTS[:3])
    expected = fp.TokenBatch.from_ids(ragged["input_ids"])
    assert fp.TokenBatch.from_ids(ragged).content_hash == expected.content_hash
    assert fp.load_text(ragged).content_hash == expected.content_hash
    assert ids_of(fp.TokenBatch.from_ids(tokenizer(TEXTS[0]))) == [ragged["input_ids"][0]]
    padding = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="<s>")
    for side in ("left", "right"):
        padded = padding([*TEXTS[:3], "4"], padding=True, padding_side=side, return_tensors="pt")
        assert padded["attention_mask"].min() == 0
        batch = fp.TokenBatch.from_ids(padded)
        assert ids_of(batch)[:3] == ragged["input_ids"]
        assert batch.num_tokens == padded["attention_mask"].sum()


def test_lists_of_tensors_with_one_row():
    rows = [torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8]]), torch.tensor([[1, 2], [3, 4]])]
    batch = fp.TokenBatch.from_ids(rows)
    assert ids_of(batch) == [[5, 6, 7], [5, 8], [1, 2], [3, 4]]
    same = fp.TokenBatch.from_ids([{"input_ids": row} for row in rows])
    assert same.content_hash == batch.content_hash == fp.load_text(rows).content_hash
    data = datasets.Dataset.from_dict({"input_ids": ids_of(batch)})
    assert fp.TokenBatch.from_ids(data).content_hash == batch.content_hash
    assert fp.load_text(data).content_hash == batch.content_hash
    assert ids_of(fp.load_text(data, num_samples=3, seq_len=2, seed=1)) in (
        [[row[:2] for i, row in enumerate(ids_of(batch)) if i != out] for out in range(4)]
    )
    assert "sequence 1 must be integer" in refused(
        fp.TokenBatch.from_ids, [rows[0], torch.ones(1, 1, 2)]
    )


def test_labels_say_what_counts():
    batch = fp.TokenBatch.from_ids(
        {
            "input_ids": torch.tensor([[5, 6, 7, 8, 0], [0, 3, 1, 4, 1]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
            "labels": torch.tensor([[5, -100, 7, -100, -100], [-100, -100, 1, -100, 1]]),
        }
    )
    assert ids_of(batch) == [[5, 6, 7, 8], [3, 1, 4, 1]]
    assert batch.target_token.tolist() == [7, 1, 1]
    assert batch.target_source.tolist() == [1, 4, 6]
    assert batch.target_counts.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("batch", "culprit"),
    [
        ({"ids": [[1, 2]]}, "the batch must hold input_ids; its keys are ids"),
        ([{"input_ids": [1, 2]}, {}], "batch 1 must hold input_ids; its keys are none"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "labels must have the shape of input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]] * 2}, "attention_mask must have the"),
        ({"input_ids": [[1, 2, 3]], "labels": [[2, 3, -100]]}, "labels must be -100 or the token"),
        ({"input_ids": [[1, 2]], "labels": [[1, -100]]}, "sequence 0 has no target"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "0 at the ends only"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "sequence 0 has 0 tokens"),
        ({"input_ids": [["a"]]}, "must be integer token ids"),
    ],
)
def test_refused_batches(batch, culprit):
    assert culprit in refused(fp.TokenBatch.from_ids, batch)


# -- tokens that begin and end a text --------------------------------------------------------------


def framed(single: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with another rule of what it puts around a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(make_tokenizer(adds_bos=False)._tokenizer.to_str())
    tokenizer.add_special_tokens(["</s>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


PLAIN, BEGINS, ENDS, BOTH = map(framed, ("$A", "<s> $A", "$A </s>", "<s> $A </s>"))


@pytest.mark.parametrize(("ending", "plain"), [(ENDS, PLAIN), (BOTH, BEGINS)])
def test_a_token_that_ends_every_text_is_dropped(ending, plain):
    """Questions and text are those of the same tokenizer without the end token."""
    assert ending("the sea")["input_ids"][-1] == ending.eos_token_id
    questions = [
        {"prompt": "the sum of 4 and 4 is", "choices": ["8", "42"], "answer": 0},
        {"prompt": "the sea is ", "choices": ["blue", "the sky"], "answer": 1},
    ]
    tasks = [fp.load_tasks(questions, tokenizer) for tokenizer in (ending, plain)]
    assert tasks[0].content_hash == tasks[1].content_hash
    for bos in (None, True, False):
        batches = [fp.load_text(TEXTS, t, bos=bos, **SIZE) for t in (ending, plain)]
        assert batches[0].content_hash == batches[1].content_hash
        assert ending.eos_token_id not in batches[0].ids


def test_prompts_that_hold_their_own_first_token_get_no_second_one():
    rows = [
        {"prompt": prompt, "choices": ["8", "4"], "answer": 0} for prompt in ("<s>4 is", "4 is")
    ]
    ours, plain = (fp.load_tasks([row], BEGINS) for row in rows)
    assert ours.content_hash == plain.content_hash


@pytest.mark.parametrize(
    ("tokenizer", "bos", "begins"),
    [(BEGINS, None, True), (BEGINS, True, True), (PLAIN, None, False), (PLAIN, True, True)],
)
def test_windows_begin_with_bos(tokenizer, bos, begins):
    begin = tokenizer.bos_token_id
    batch = fp.load_text(TEXTS, tokenizer, num_samples=None, seq_len=12, bos=bos)
    windows = batch.ids.reshape(-1, 12)  # the length counts the token
    assert (windows[:, 0] == begin).all() == begins
    assert begin not in batch.target_token  # nor where a text begins inside of a window
    if begins:
        bodies = [token for window in windows for token in window if token != begin]
        stream = [token for text in TEXTS for token in PLAIN(text)["input_ids"]]
        assert bodies == stream[: len(bodies)]
        assert (windows[:, :2] != begin).sum() == len(windows)  # never twice
        assert (windows[:, 1:] == begin).any() == (tokenizer is BEGINS)  # texts keep their mark
    else:
        plain = fp.load_text(TEXTS, tokenizer, num_samples=None, seq_len=12, bos=False)
        assert batch.content_hash == plain.content_hash


def test_a_window_at_the_beginning_of_a_text_has_bos_once():
    texts = ["44", "4444", "4"]  # <s> 4 4, <s> 4 4 4 4, <s> 4
    begin, four = BEGINS("4")["input_ids"]
    batch = fp.load_text(texts, BEGINS, seq_len=3)
    assert ids_of(batch) == [[begin, four, four]] * 3
    assert batch.target_counts.tolist() == [2, 2, 2]
    batch = fp.load_text(texts, BEGINS, seq_len=4)
    assert ids_of(batch) == [
        [begin, four, four, begin],
        [begin, four, four, four],
        [begin, four, begin, four],
    ]
    assert batch.target_counts.tolist() == [2, 3, 2]


def test_refused_bos():
    nameless = PreTrainedTokenizerFast(tokenizer_object=PLAIN._tokenizer)
    assert "bos must be False or None" in refused(fp.load_text, TEXTS, nameless, bos=True)
    assert "bos must be True, False or None" in refused(fp.load_text, TEXTS, PLAIN, bos=1)


# -- chats -----------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
CHAT = [
    {"role": "user", "content": "the sum?"},
    {"role": "assistant", "content": "it is 4"},
    {"role": "user", "content": "and the sea?"},
    {"role": "assistant", "content": "it is blue"},
]


def chatting(template=TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = framed("<s> $A")
    tokenizer.chat_template = template
    return tokenizer


def targets(batch: fp.TokenBatch, tokenizer) -> list[str]:
    parts = [batch.target_token[batch.target_continuation == i] for i in range(batch.num_rows)]
    return [tokenizer.decode(part) for part in parts]


def test_messages_through_the_chat_template(tmp_path):
    tokenizer = chatting()
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT[:n]}) + "\n" for n in (4, 2)))
    batch = fp.load_text(path, tokenizer)
    texts = [tokenizer.apply_chat_template(CHAT[:n], tokenize=False) for n in (4, 2)]
    assert [tokenizer.decode(ids) for ids in ids_of(batch)] == texts
    assert targets(batch, tokenizer) == [" it is blue\n", " it is 4\n"]
    assert batch.source == f"{path}, conversations, loss on completion"
    every = fp.load_text(path, tokenizer, loss_on="all")
    assert ids_of(every) == ids_of(batch)
    assert [f"<s>{text}" for text in targets(every, tokenizer)] == texts
    assert fp.load_text(path, tokenizer, num_samples=1).num_rows == 1
    longest = int(batch.row_lengths.max())
    assert fp.load_text(path, tokenizer, seq_len=longest - 1).row_lengths.max() == longest - 1
    assert "holds 2 sequences" in refused(fp.load_text, path, tokenizer, num_samples=3)


def test_prompts_and_completions():
    tokenizer = chatting()
    rows = [
        {"prompt": "the sum?", "completion": "it is 4"},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
    ]
    batch = fp.load_text(rows, tokenizer)
    whole = tokenizer.apply_chat_template(CHAT[:2], tokenize=False)
    assert [tokenizer.decode(ids) for ids in ids_of(batch)] == [whole, whole]
    assert targets(batch, tokenizer) == [" it is 4\n"] * 2
    plain = fp.load_text([{"prompt": "the sum? ", "completion": "it is 4"}], BEGINS)
    assert BEGINS.decode(ids_of(plain)[0]) == "<s>the sum? it is 4"  # there is no template
    assert targets(plain, BEGINS) == [" it is 4"]


def test_chat_templates_from_files_and_by_name(tmp_path):
    rows, other = [{"messages": CHAT[:2]}], TEMPLATE.replace(": ", "> ")
    path = tmp_path / "template.jinja"
    path.write_text(other)
    named = chatting({"default": TEMPLATE, "other": other})
    expected = fp.load_text(rows, chatting(other)).content_hash
    assert fp.load_text(rows, BEGINS, chat_template=str(path)).content_hash == expected
    assert fp.load_text(rows, named, chat_template="other").content_hash == expected
    assert fp.load_text(rows, named).content_hash == fp.load_text(rows, chatting()).content_hash
    message = refused(fp.load_text, rows, named, chat_template="third")
    assert "one of the tokenizer's default, other, not 'third'" in message
    message = refused(fp.load_text, TEXTS, named, chat_template="other")
    assert "chat_template is for rows of messages" in message


@pytest.mark.parametrize(
    ("row", "culprit"),
    [
        ({"messages": []}, ":2: messages must be turns like"),
        ({"messages": "hello there" * 9}, ":2: messages must end with a turn of the role assist"),
        ({"messages": CHAT[:1]}, ":2: messages must end with a turn of the role assistant, not 'u"),
        ({"messages": [{"role": "user"}]}, ":2: messages must be turns like"),
        ({"prompt": 3, "completion": "a"}, ":2: prompt must be turns like"),
        ({"prompt": "a", "completion": []}, ":2: completion must be turns like"),
        ({"text": "a"}, ":2: expected a row like"),
        ([1], ":2: expected a row like"),
    ],
)
def test_refused_chats(tmp_path, row, culprit):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps(row) + "\n")
    message = refused(fp.load_text, path, chatting())
    assert f"{path}{culprit}" in message


def test_templates_that_do_not_take_a_row():
    row = [{"messages": CHAT}]
    message = refused(fp.load_text, row, BEGINS)
    assert "messages need a chat template" in message
    message = refused(fp.load_text, row, chatting("{{ raise_exception('no turns') }}"))
    assert "data[0]: the chat template takes no such row (no turns)" in message
    counts = "{{ messages | length }}" + TEMPLATE
    message = refused(fp.load_text, row, chatting(counts))
    assert message.endswith("what fits: loss_on=all")
    assert fp.load_text(row, chatting(counts), loss_on="all").num_rows == 1


# -- questions -------------------------------------------------------------------------------------


def written(tasks: fp.Tasks) -> list[tuple[list[str], int]]:
    """By question, the text of each choice behind its prompt, and the index of the right one."""
    batch, tokenizer = tasks.batch, make_tokenizer()
    questions = []
    for q, answer in enumerate(tasks.answer):
        row = slice(*batch.row_starts[q : q + 2])
        texts = []
        own = np.flatnonzero(tasks.question == q)
        for number in range(1, len(own) + 1):
            on_path = np.isin(batch.branch[row], (0, number))
            texts.append(tokenizer.decode(batch.ids[row][on_path], skip_special_tokens=True))
        questions.append((texts, int(answer - own[0])))
    return questions


ARC = {
    "id": "Mercury_1",
    "question": "the sum of 4 and 4?",
    "choices": {"text": ["8", "42", "4"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
MMLU = {"question": " the sum? ", "subject": "sums", "choices": ["8", "42"], "answer": 1}
HELLASWAG = {
    "activity_label": "Sums",
    "ctx_a": "the sea [title] is blue.",
    "ctx_b": "the sky",
    "ctx": "the sea [title] is blue. the sky",
    "endings": ["is  blue [step] too.", "is 4."],
    "label": "1",
}


@pytest.mark.parametrize(
    ("row", "prompt", "choices", "answer"),
    [
        (ARC, "Question: the sum of 4 and 4?\nAnswer:", [" 8", " 42", " 4"], 1),
        (
            ARC | {"choices": {"text": ["8", "4"], "label": ["1", "2"]}, "answerKey": "1"},
            "Question: the sum of 4 and 4?\nAnswer:",
            [" 8", " 4"],
            0,
        ),
        (MMLU, "the sum?\nA. 8\nB. 42\nAnswer:", [" A", " B"], 1),
        (MMLU | {"answer": "A"}, "the sum?\nA. 8\nB. 42\nAnswer:", [" A", " B"], 0),
        (HELLASWAG, "Sums: the sea.  is blue. The sky", [" is blue too.", " is 4."], 1),
        (
            {"ctx": "the sea", "endings": ["is blue", "is 4"], "label": 0},
            "the sea",
            [" is blue", " is 4"],
            0,
        ),
        ({"prompt": "the sea is", "choices": ["4", "blue"], "answer": "B"}, "the sea is", None, 1),
    ],
)
def test_questions_of_other_data_sets(tmp_path, row, prompt, choices, answer):
    tokenizer = make_tokenizer()
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    tasks = fp.load_tasks(tmp_path / "q.jsonl", tokenizer)
    choices = choices or [" 4", " blue"]
    ((texts, index),) = written(tasks)
    if row is HELLASWAG:  # as the harness: a double space becomes one
        prompt = prompt.replace("  ", " ")
    assert texts == [prompt + choice for choice in choices]
    assert index == answer
    assert tasks.choice_characters.tolist() == [len(choice) - 1 for choice in choices]


def test_questions_of_every_source(tmp_path):
    rows = [ARC, ARC | {"question": "the sea?", "answerKey": "A"}]
    expected = fp.load_tasks(rows, make_tokenizer())
    assert expected.source == "text in memory, questions of the form ARC"
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "q.parquet")
    data.save_to_disk(tmp_path / "folder")
    (tmp_path / "q.json").write_text(json.dumps(rows))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    files = [tmp_path / name for name in ("q.parquet", "folder", "q.json", "q.jsonl.gz")]
    for source in (data, pd.DataFrame(rows), *files):
        tasks = fp.load_tasks(source, make_tokenizer())
        assert tasks.content_hash == expected.content_hash


@pytest.mark.parametrize(
    ("row", "culprit"),
    [
        (ARC | {"answerKey": "D"}, "answerKey must be one of the labels A, B, C, not 'D'"),
        (ARC | {"choices": ["8", "4"]}, 'choices["text"] must be a list of strings'),
        (
            ARC | {"choices": {"text": ["8", "4"], "label": ["A"]}},
            'choices["label"] must be a list with one label a choice',
        ),
        (ARC | {"question": None}, "question must be text, not None"),
        (MMLU | {"answer": 2}, "answer must be the index of a choice, 0 to 1, not 2"),
        (MMLU | {"answer": "C"}, "not 'C' (or its letter, A to B)"),
        (MMLU | {"choices": "AB"}, "choices must be a list of strings"),
        (MMLU | {"choices": ["4"] * 27}, "choices must be at most 26, not 27"),
        (HELLASWAG | {"label": ""}, "label must be the index of a choice, 0 to 1, not ''"),
        (HELLASWAG | {"endings": []}, "endings must be a list of strings"),
        (
            {"prompt": "the", "choices": ["B", "A"], "answer": "B"},
            "answer 'B' names a choice by its letter and another by its text; give the index",
        ),
        ({"prompt": "the", "choices": ["4", "8"], "answer": 0, "delimiter": 3}, "delimiter must"),
        ({"q": "the sum?"}, "or one of ARC, MMLU, HellaSwag"),
    ],
)
def test_refused_questions_name_the_field(tmp_path, row, culprit):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ARC) + "\n" + json.dumps(row) + "\n")
    message = refused(fp.load_tasks, path, make_tokenizer())
    assert message.startswith(f"{path}:2: ")
    assert culprit in message


def test_the_delimiter_is_no_part_of_a_choice():
    """A file scores alike whether its choices begin with the delimiter or not."""
    rows = [{"prompt": "the sum is", "choices": ["8", "42", "blué"], "answer": 1}]
    spaced = [rows[0] | {"choices": [" 8", " 42", " blué"]}]
    first, second = (fp.load_tasks(data, make_tokenizer()) for data in (rows, spaced))
    assert first.content_hash == second.content_hash
    assert written(first) == [(["the sum is 8", "the sum is 42", "the sum is blué"], 1)]
    assert first.choice_characters.tolist() == [1, 2, 4]
    assert first.choice_bytes.tolist() == [1, 2, 5]
    lines = [rows[0] | {"delimiter": "\n"}]
    own = fp.load_tasks(lines, make_tokenizer())
    option = fp.load_tasks(rows, make_tokenizer(), delimiter="\n")
    assert own.content_hash == option.content_hash
    assert written(own)[0][0][0] == "the sum is\n8"
    none = fp.load_tasks(spaced, make_tokenizer(), delimiter="")
    assert written(none) == written(first)
    assert none.choice_characters.tolist() == [2, 3, 5]
    assert "delimiter must be text" in refused(
        fp.load_tasks, rows, make_tokenizer(), delimiter=None
    )
