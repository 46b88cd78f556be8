"""lorp, shortgpt and streamline against NumPy written from their equations, and against a model's
own states."""

from __future__ import annotations

import itertools

import families
import numpy as np
import pytest
import torch
import transformers as tf
from sklearn.cluster import SpectralClustering

import fastprune as fp
from fastprune.search.similarity import cluster_units, redundancy_score
from fastprune.testing import SyntheticEvaluator

BLOCKS = 8


# -- the equations, one by one, without the library ------------------------------------------------


def mean_cosines(states: list[np.ndarray]) -> np.ndarray:
    """S_ij, the mean over tokens of cosine(h_i, h_j); states: [tokens, D] for each depth."""
    size = len(states)
    S = np.ones((size, size))
    for i, j in itertools.permutations(range(size), 2):
        a, b = states[i], states[j]
        S[i, j] = np.mean([x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(a, b)])
    return S


def reference_rls(S: np.ndarray) -> float:
    return -np.log2(np.mean([S[i, j] for i, j in itertools.combinations(range(len(S)), 2)]))


def reference_labels(S: np.ndarray, K: int) -> list[int]:
    affinity = (S + 1) / 2
    np.fill_diagonal(affinity, 1.0)
    raw = SpectralClustering(
        K, affinity="precomputed", assign_labels="kmeans", random_state=0
    ).fit_predict(affinity)
    names: dict[int, int] = {}
    return [names.setdefault(label, len(names)) for label in raw.tolist()]


def reference_lorp(S: np.ndarray, labels: list[int], k: int, protect=()) -> set[int]:
    size = len(S)
    protected = {0, size - 1, *protect}
    clusters = [[i for i in range(size) if labels[i] == c] for c in range(max(labels) + 1)]
    queues = []
    for members in clusters:
        redundancy = {}
        for i in members:
            others = [S[i, j] for j in members if j != i]
            redundancy[i] = np.mean(others) if others else -np.inf
        free = [i for i in members if i not in protected]
        queues.append(
            sorted(free, key=redundancy.get, reverse=True)
        )  # stable: equal ones keep their order
    pruned: list[int] = []
    for queue in queues:  # stage 1
        if queue and len(pruned) < k:
            pruned.append(queue.pop(0))
    while len(pruned) < k:  # stage 2
        highest, chosen = None, None
        for c, members in enumerate(clusters):
            if not queues[c]:
                continue
            left = [i for i in members if i not in pruned]
            pairs = [S[i, j] for i, j in itertools.combinations(left, 2)]
            mu = np.mean(pairs) if pairs else -np.inf
            if highest is None or mu > highest:
                highest, chosen = mu, c
        pruned.append(queues[chosen].pop(0))
    return set(pruned)


# -- a model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        **(families.LLAMA_LIKE | {"num_hidden_layers": BLOCKS}), tie_word_embeddings=False
    )
    return tf.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    return families.random_rows(97, [17, 23, 9], seed=1)


@pytest.fixture(scope="module")
def states(llama, rows) -> list[np.ndarray]:
    """The input of every block and the output of the last, before the final norm: [tokens, D]
    each."""
    seen: list[list[np.ndarray]] = [[] for _ in range(BLOCKS + 1)]

    def keep(depth):
        return lambda module, inputs, output: seen[depth].append(
            (output[0] if isinstance(output, tuple) else output).double().numpy().reshape(-1, 36)
        )

    layers = families.layers_of(llama)
    hooks = [llama.get_input_embeddings().register_forward_hook(keep(0))]
    hooks += [layer.register_forward_hook(keep(depth)) for depth, layer in enumerate(layers, 1)]
    with torch.no_grad():
        for row in rows:
            llama(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return [np.concatenate(depth) for depth in seen]


@pytest.fixture(scope="module")
def evaluator(llama, rows) -> fp.Evaluator:
    return fp.Evaluator(llama, fp.Perplexity(fp.TokenBatch.from_ids(rows)))


def test_similarity_of_a_model(evaluator, states):
    np.testing.assert_allclose(evaluator.similarity(), mean_cosines(states), atol=1e-6, rtol=0)


@pytest.mark.parametrize("clusters", [0, 1, 2, 3, 4])
def test_lorp_on_a_model(evaluator, states, clusters):
    S = mean_cosines(states[:-1])
    rls = reference_rls(S)
    assert redundancy_score(evaluator.similarity()[:-1, :-1]) == pytest.approx(rls, abs=1e-5)
    K = clusters or (2 if rls >= 1.0 else 3 if rls >= 0.7 else 4)
    labels = reference_labels(S, K) if K > 1 else [0] * BLOCKS
    assert cluster_units(evaluator.similarity()[:-1, :-1], K).tolist() == labels
    for k in range(1, BLOCKS - 1):
        assert {*fp.run_search(evaluator, "lorp", k, clusters=clusters).removed} == reference_lorp(
            S, labels, k
        )


def test_shortgpt_and_streamline_on_a_model(evaluator, states):
    cosine = mean_cosines(states)
    influence = [1 - cosine[i, i + 1] for i in range(BLOCKS)]
    for k in range(1, BLOCKS):
        expected = sorted(range(BLOCKS), key=lambda i: influence[i])[:k]
        assert fp.run_search(evaluator, "shortgpt", k).removed == tuple(sorted(expected))
        start = max(range(BLOCKS - k + 1), key=lambda i: cosine[i, i + k])
        assert fp.run_search(evaluator, "streamline", k).removed == tuple(range(start, start + k))
    for k in range(1, BLOCKS - 1):
        expected = sorted(range(1, BLOCKS - 1), key=lambda i: influence[i])[:k]
        assert fp.run_search(evaluator, "shortgpt", k, variant="lorp").removed == tuple(
            sorted(expected)
        )
        start = max(range(1, BLOCKS - k), key=lambda i: cosine[i, i + k])
        assert fp.run_search(evaluator, "streamline", k, variant="lorp").removed == tuple(
            range(start, start + k)
        )


def test_angular_distance_of_the_last_tokens(evaluator, states, rows):
    """Gromov's variant: the mean of the angles, which is not the angle of the mean cosine, at the
    last tokens only."""
    last = np.cumsum([len(row) for row in rows]) - 1
    unit = np.stack([h[last] / np.linalg.norm(h[last], axis=1, keepdims=True) for h in states])
    angles = np.arccos(np.einsum("itd,jtd->tij", unit, unit).clip(-1, 1)).mean(axis=0) / np.pi
    np.fill_diagonal(angles, 0)
    np.testing.assert_allclose(evaluator.angular_distance(), angles, atol=1e-5, rtol=0)
    for k in range(1, BLOCKS):
        start = min(range(BLOCKS - k + 1), key=lambda i: angles[i, i + k])
        result = fp.run_search(evaluator, "streamline", k, variant="gromov")
        assert result.removed == tuple(range(start, start + k))
        assert result.evaluations == 1


def test_angular_distance_of_questions_is_that_of_their_choices(llama):
    prompt = families.random_rows(97, [6], seed=2)[0]
    choices = families.random_rows(97, [1, 4, 2], seed=3)
    tasks = fp.Tasks(
        batch=fp.TokenBatch.from_continuations(
            [[(np.array([*prompt, *choice]), 6) for choice in choices]]
        ),
        question=np.zeros(3, dtype=int),
        answer=np.array([1]),
        choice_characters=np.ones(3, dtype=int),
        choice_bytes=np.ones(3, dtype=int),
    )
    text = fp.TokenBatch.from_ids([[*prompt, *choice] for choice in choices])
    found = fp.Evaluator(llama, fp.TaskMargin(tasks)).angular_distance()
    np.testing.assert_allclose(
        found, fp.Evaluator(llama, fp.Perplexity(text)).angular_distance(), atol=1e-5, rtol=0
    )


def test_one_mask_is_scored(evaluator):
    for name in ("lorp", "shortgpt", "streamline"):
        assert fp.run_search(evaluator, name, 3).evaluations == 1


# -- many matrices ---------------------------------------------------------------------------------


class Given(SyntheticEvaluator):
    """An evaluator whose similarity is given."""

    def __init__(self, similarity: np.ndarray):
        super().__init__(len(similarity) - 1)
        self._similarity = similarity

    def similarity(self) -> np.ndarray:
        return self._similarity


@pytest.mark.parametrize("clusters", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(4))
def test_lorp_on_random_states(seed, clusters):
    similarity = SyntheticEvaluator(16, seed).similarity()
    S = similarity[:-1, :-1]
    labels = reference_labels(S, clusters)
    for k in (1, 2, 4, 7, 12, 14):
        found = fp.run_search(Given(similarity), "lorp", k, clusters=clusters).removed
        assert {*found} == reference_lorp(S, labels, k)
    for k in (1, 3, 7, 11):
        found = fp.run_search(
            Given(similarity), "lorp", k, clusters=clusters, protect=(3, 4, 9)
        ).removed
        assert {*found} == reference_lorp(S, labels, k, (3, 4, 9))


@pytest.mark.parametrize(
    ("rls", "clusters"), [(1.2, 2), (1.0, 2), (0.99, 3), (0.7, 3), (0.69, 4), (0.1, 4)]
)
def test_rls_decides_the_number_of_clusters(rls, clusters):
    size = 12
    S = SyntheticEvaluator(size - 1, 5).similarity()
    upper = np.triu_indices(size, 1)
    mean = S[upper].mean()
    S = np.where(
        np.eye(size), 1.0, S * (2.0**-rls / mean) * (1 - 1e-12)
    )  # as asked, rounded to above
    similarity = np.eye(size + 1)
    similarity[:size, :size] = S
    assert redundancy_score(S) == pytest.approx(rls)
    for k in (4, 6, 9):
        found = fp.run_search(Given(similarity), "lorp", k).removed
        assert found == fp.run_search(Given(similarity), "lorp", k, clusters=clusters).removed
        assert {*found} == reference_lorp(S, reference_labels(S, clusters), k)


def test_unlike_states_have_an_infinite_score_and_two_clusters():
    assert redundancy_score(np.where(np.eye(4), 1.0, -0.1)) == np.inf


def test_ties_go_to_the_lowest_index():
    similarity = np.where(np.eye(9), 1.0, 0.5)
    assert fp.run_search(Given(similarity), "shortgpt", 3).removed == (0, 1, 2)
    assert fp.run_search(Given(similarity), "shortgpt", 3, variant="lorp").removed == (1, 2, 3)
    assert fp.run_search(Given(similarity), "streamline", 3).removed == (0, 1, 2)
    assert fp.run_search(Given(similarity), "streamline", 3, variant="lorp").removed == (1, 2, 3)
    assert fp.run_search(Given(similarity), "lorp", 3, clusters=1).removed == (1, 2, 3)


def test_without_room_the_last_unit_goes_and_then_the_first():
    for name, options in (("lorp", {}), ("shortgpt", {"variant": "lorp"})):
        evaluator = SyntheticEvaluator(6, 2)
        assert fp.run_search(evaluator, name, 4, **options).removed == (1, 2, 3, 4)
        assert fp.run_search(evaluator, name, 5, **options).removed == (1, 2, 3, 4, 5)
        assert fp.run_search(evaluator, name, 5, protect=(5,), **options).removed == (0, 1, 2, 3, 4)
    similarity = np.where(np.eye(7), 1.0, 0.5)
    similarity[1, 6] = 0.9  # over units 1 to 5
    assert fp.run_search(Given(similarity), "streamline", 5, variant="lorp").removed == (
        1,
        2,
        3,
        4,
        5,
    )


def test_states_that_are_not_finite_are_an_error():
    similarity = np.eye(5)
    similarity[1, 2] = np.nan
    for name in ("lorp", "shortgpt", "streamline"):
        with pytest.raises(ArithmeticError, match="similarity"):
            fp.run_search(Given(similarity), name, 2)
