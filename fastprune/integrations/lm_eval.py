"""lm-evaluation-harness on masked models: one, as the harness's model `fastprune`, or many at once.

The harness's own `hf` model does what it does for any model: it encodes texts, splits and truncates them, cuts
windows, generates. Only the likelihoods come from the engine: of all masks together, with shared prefixes.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ..data import TokenBatch, common_prefix
from ..errors import InputError, nearest
from ..evaluator import Evaluator
from ..masks import as_masks, from_removed, parse_removed, to_removed
from ..models import load_model
from ..objectives import Objective
from ..records import shown
from . import require_harness

require_harness()

from lm_eval import evaluate, simple_evaluate, utils  # noqa: E402
from lm_eval.api.registry import model_registry  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

MOST_ROW = 1024  # tokens of a row that gathers sequences, or twice the longest of them: it sees itself all over
NOT_FOR_MASKS = ("model", "model_args", "tasks", "use_cache", "evaluation_tracker", "device", "verbosity")


class MaskedLM(HFLM):
    """A model without some of its blocks, as lm-evaluation-harness takes it: `--model fastprune`.

    pretrained: "demo", a folder, a hub id, or a model in memory. removed: units to leave out, such as "9-11" or
    [9, 10]. granularity, backend, memory_bytes, store, progress: as `Evaluator` takes them. tokenizer (a name, or one
    in memory), dtype, device, max_length, add_bos_token, prefix_token_id, truncation, think_end_token,
    enable_thinking and chat_template_args: as the harness's `hf` takes them; batch_size and max_batch_size are those
    of generation, likelihoods are batched by the byte budget.

    masks: bool[N, U]; likelihoods are computed for all of them when they are first asked for. current: the one
    whose answers are given.

    Raises InputError for a unit that is out of range, an argument that is not known, and a model without a tokenizer.
    """

    def __init__(
        self,
        pretrained,
        removed=(),
        *,
        tokenizer=None,
        dtype: str | torch.dtype | None = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        granularity: str = "block",
        backend: str = "auto",
        memory_bytes: int | None = None,
        store=None,
        progress=None,
        add_bos_token: bool | None = None,
        **settings,
    ):
        _check_names("model_args", settings, OF_HF)
        if device == "cuda:0" and not torch.cuda.is_available():  # what the harness's command line says by itself
            device = None
        dtype = None if dtype == "auto" else dtype
        self.opened = load_model(pretrained, device, dtype, trust_remote_code=trust_remote_code)
        self.opened.require(granularity)
        self._granularity = granularity
        self._running = {
            "granularity": granularity,
            "backend": backend,
            "memory_bytes": memory_bytes,
            "cache_bytes": 0,  # every request is asked for in one call: nothing is left for another
            "store": store,
            "progress": progress,
        }
        units = len(self.opened.unit_names(granularity))
        self.masks = from_removed([_units(removed)], units)
        with self.opened.evaluation():
            super().__init__(
                pretrained=self.opened,  # no module: the harness would change its flags and ties
                tokenizer=self._tokenizer(tokenizer, add_bos_token, trust_remote_code),
                trust_remote_code=trust_remote_code,
                add_bos_token=add_bos_token,
                **settings,
            )

    @property
    def masks(self) -> np.ndarray:
        return self._masks

    @masks.setter
    def masks(self, masks) -> None:
        self._masks = as_masks(masks, len(self.opened.unit_names(self._granularity)))
        self._known: dict[str, dict[tuple, list]] = {"loglikelihood": {}, "loglikelihood_rolling": {}}
        self.current = 0

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        ask = super().loglikelihood
        return self._recall("loglikelihood", requests, lambda new: ask(new, disable_tqdm=True))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        return self._recall("loglikelihood_rolling", requests, self._roll)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """By transformers, on the model without the current mask's blocks. Raises InputError where it cannot run."""
        try:
            with self.generating(self.current) as self._model:
                return super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self._model = self.opened

    @contextmanager
    def generating(self, number: int) -> Iterator[torch.nn.Module]:
        """The transformers model masked by mask `number`, once it has been seen to generate as it should.

        Raises InputError where it does not: for half blocks, and for a family that needs its blocks as they are.
        """
        kept, model = np.flatnonzero(self.masks[number]).tolist(), self.opened
        if self._granularity != "block":
            raise InputError("text is generated without whole blocks only; half a block can be scored, not left out")
        removed = to_removed(self.masks[number])
        refusal = f"{model.name}: the family {model.family!r} cannot generate without blocks {removed}"
        with model.evaluation():
            ids = model.probe_ids()
            state, arguments = model.open(ids)
            for block in kept:
                state = model.run(block, state, arguments)
            expected = model.logits(state.flatten(0, 1))
            with model.masked(removed) as hf:
                try:
                    before = hf(input_ids=ids[:, :-1], use_cache=True)
                    after = hf(input_ids=ids[:, -1:], past_key_values=before.past_key_values, use_cache=True)
                except Exception as error:  # whatever it is, the family's own code cannot do it
                    raise InputError(f"{refusal}: {type(error).__name__}: {error}") from error
                if not model.agree(torch.cat([before.logits, after.logits], dim=1).flatten(0, 1), expected):
                    raise InputError(f"{refusal}: its own code gives other logits")
                yield hf

    def get_model_info(self) -> dict:
        """What the harness's results say about the model."""
        return {
            "pretrained": self.opened.name,
            "removed": list(to_removed(self.masks[self.current])),
            "granularity": self._granularity,
            "model_dtype": str(self.opened.dtype).removeprefix("torch."),
        }

    @property
    def tokenizer_name(self) -> str:
        return (self.tokenizer.name_or_path or self.opened.name).replace("/", "__")

    def _recall(self, kind: str, requests, ask) -> list:
        """The current mask's answers; `ask` gives those of all masks to what was not asked before."""
        known = self._known[kind]
        new = list({request.args: request for request in requests if request.args not in known}.values())
        known.update(zip((request.args for request in new), ask(new), strict=True))
        found = [known[request.args][self.current] for request in requests]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return found

    def _roll(self, requests) -> list[list[float]]:
        """Log-likelihoods of whole texts, by request and mask, over the harness's windows."""
        windows = []
        for number, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(number, *utils.make_disjoint_window(window)) for window in rolling]
        sums = np.zeros((len(requests), len(self.masks)))
        answers = self._loglikelihood_tokens([(None, *tokens) for _, *tokens in windows])
        for (number, *_), by_mask in zip(windows, answers, strict=True):
            sums[number] += [likelihood for likelihood, _ in by_mask]
        return sums.tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[list[tuple[float, bool]]]:
        """(log-likelihood, greedy) by request and mask. requests: (what, context tokens, continuation tokens)."""
        if not requests:
            return []
        pairs = [self._inputs(*request) for request in requests]
        rows = _gather([ids for ids, _ in pairs])
        try:
            likelihoods, greedy = self._run(pairs, rows)
        except InputError:
            if len(rows) == len(pairs):
                raise
            rows = [[number] for number in range(len(pairs))]  # of a family that runs no trees of tokens
            likelihoods, greedy = self._run(pairs, rows)
        place = np.argsort(np.concatenate(rows))  # of each request among the continuations
        columns = zip(likelihoods.T[place].tolist(), greedy.T[place].tolist(), strict=True)
        return [list(zip(*column, strict=True)) for column in columns]

    def _run(self, pairs: Sequence[tuple], rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihoods float64[N, C] and greedy flags bool[N, C], continuations in the order of the rows."""
        batch = TokenBatch.from_predictions([[pairs[number] for number in row] for row in rows])
        evaluator = Evaluator(self.opened, _Sums(batch), **self._running)
        nll, misses = np.moveaxis(evaluator.sums(self.masks), 1, 0)
        return -nll, misses == 0

    def _inputs(self, what, context: Sequence[int], continuation: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What is run and what it is to predict; a context that is too long loses its beginning, as `hf` has it."""
        if not context or not 1 <= len(continuation) <= self.max_length:
            named = f" of {shown(what[1])}" if what else ""
            raise InputError(
                f"a continuation{named} has {len(continuation)} tokens after {len(context)}; it needs a token before "
                f"it, and from 1 to {self.max_length} (max_length) of its own"
            )
        whole = np.asarray([*context, *continuation][-(self.max_length + 1) :], dtype=np.int64)
        return whole[:-1], whole[len(whole) - len(continuation) :]

    def _tokenizer(self, tokenizer, add_bos_token: bool | None, trust_remote_code: bool):
        """One of this object's own, since the harness gives it a padding token."""
        tokenizer = self.opened.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise InputError(f"{self.opened.name}: tasks need a tokenizer, and the model has none; give tokenizer=...")
        if isinstance(tokenizer, str) or add_bos_token is not None:
            from transformers import AutoTokenizer

            place = tokenizer if isinstance(tokenizer, str) else tokenizer.name_or_path
            adds = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
            try:
                return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **adds)
            except (OSError, ValueError) as error:
                raise InputError(f"{place}: cannot be read as a tokenizer: {str(error).splitlines()[0]}") from error
        return copy.deepcopy(tokenizer)


OF_HF = ("max_length", "batch_size", "max_batch_size", "prefix_token_id", "truncation", "think_end_token")
OF_HF += ("enable_thinking", "chat_template_args")
OF_LM = tuple(n for n, p in inspect.signature(MaskedLM).parameters.items() if p.kind is p.KEYWORD_ONLY) + OF_HF
OF_EVALUATION = tuple(name for name in inspect.signature(simple_evaluate).parameters if name not in NOT_FOR_MASKS)

if "fastprune" not in model_registry:  # releases of the harness that read entry points have it already
    model_registry.register("fastprune")(MaskedLM)


class _Sums(Objective):
    """Sums over continuations as they are: a sample is a continuation."""

    name = "requests"
    measure = "greedy"

    def __init__(self, batch: TokenBatch):
        self.batch, self.sample = batch, np.arange(batch.num_continuations)
        self.weight, self.sample_weight = np.ones((2, batch.num_continuations))


def evaluate_masks(model, masks, tasks: Sequence[str], *, include_path=None, **settings) -> list[dict]:
    """What `lm_eval.simple_evaluate` returns for the model under each mask, in their order.

    model: as `MaskedLM` takes it. masks: bool or 0/1 [N, U], True = kept. tasks: names as `lm_eval ls tasks` lists
    them, patterns such as "mmlu_*", or .yaml files; include_path: a folder with more. settings: of MaskedLM
    (granularity, backend, tokenizer, max_length, ...) and of simple_evaluate (limit, num_fewshot, bootstrap_iters,
    log_samples, gen_kwargs, task_manager, ...).

    Tasks are loaded once, and each likelihood is asked for once: all masks answer together, sharing prefixes, and
    what a mask gets does not depend, to the bit, on the others. The harness is then run for each mask on these
    answers. Text is generated mask by mask. `config` in each result says what was removed.

    Raises InputError for a task or a setting that is not known, and before anything is scored where a task generates
    and a mask cannot.
    """
    _check_names("settings", settings, (*OF_LM, *OF_EVALUATION))
    manager = find_tasks(tasks, include_path, settings.pop("task_manager", None))
    names = list(dict.fromkeys(name for task in tasks for name in manager.match_tasks([task]) or [task]))
    lm = MaskedLM(model, **{name: settings.pop(name) for name in OF_LM if name in settings})
    lm.masks = masks

    def check(loaded: Mapping) -> None:
        if any(task.OUTPUT_TYPE == "generate_until" for task in loaded.values()):
            for number in range(len(lm.masks)):
                with lm.generating(number):
                    pass

    if not len(lm.masks):
        return []
    loading = _Loading(manager, check)
    first = simple_evaluate(model=lm, tasks=names, task_manager=loading, **settings)
    # what the harness does once more for every model: seeds, loading, asking the machine about itself
    defaults = {name: parameter.default for name, parameter in inspect.signature(simple_evaluate).parameters.items()}
    given = {**defaults, **settings}
    arguments = {name: given[name] for name in inspect.signature(evaluate).parameters if name in given}
    arguments["log_samples"] = given["predict_only"] or given["log_samples"]
    results = [first]
    for number in range(1, len(lm.masks)):
        lm.current = number
        loading.rewind(given["fewshot_random_seed"])
        found = evaluate(lm=lm, task_dict=loading.found, **arguments)
        results.append({**first, **found, "config": {**first["config"], **lm.get_model_info()}})
    return results


def find_tasks(tasks: Sequence[str], include_path=None, manager: TaskManager | None = None) -> TaskManager:
    """A manager that knows the tasks. Raises InputError for one that is not known, and where none is named."""
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks) or not len(tasks):
        raise InputError(f"tasks are given as a list of names such as ['arc_easy'], not {shown(tasks)}")
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"{include_path}: no such folder of tasks")
    if manager is None and include_path is not None:  # the harness's own many are looked through only if need be
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        manager = manager if set(tasks) <= set(manager.all_subtasks) else None
    manager = manager or TaskManager(include_path=include_path and str(include_path))
    for task in tasks:
        if not manager.match_tasks([task]) and not (task.endswith((".yaml", ".yml")) and Path(task).is_file()):
            close = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"unknown task {shown(task)}; {hint}`lm_eval ls tasks` lists the harness's own")
    return manager


# of the generators that the harness seeds and its tasks draw from
RANDOM = [(random.getstate, random.setstate), (torch.get_rng_state, torch.set_rng_state)]
RANDOM += [(np.random.get_state, np.random.set_state)]


class _Loading:
    """A manager that keeps the tasks it loads, and the states of random numbers at that moment.

    check: called with the tasks, by name, when they have been loaded.
    """

    def __init__(self, manager: TaskManager, check: Callable[[Mapping], None]):
        self._manager, self._check = manager, check

    def load(self, names):
        self.found = self._manager.load(names)
        self._check(self.found["tasks"])
        self._states = [take() for take, _ in RANDOM]
        return self.found

    def rewind(self, fewshot_seed: int | None) -> None:
        """Let the tasks draw once more what they drew when they had just been loaded."""
        for (_, put_back), state in zip(RANDOM, self._states, strict=True):
            put_back(state)
        for task in self.found["tasks"].values():
            task.set_fewshot_seed(seed=fewshot_seed)

    def __getattr__(self, name: str):
        return getattr(self._manager, name)


def _gather(sequences: Sequence[np.ndarray]) -> list[list[int]]:
    """Numbers of the sequences by row: what begins alike is one tree, where that spares a quarter of a sequence."""
    rows: list[list[int]] = []
    trunk = length = total = 0  # of the last row: tokens that all share, tokens in all, and those of its sequences
    for number in sorted(range(len(sequences)), key=lambda number: sequences[number].tolist()):
        ids = sequences[number]
        if rows:
            shared = min(trunk, common_prefix([sequences[rows[-1][0]], ids]))
            joined = total + len(ids) - len(rows[-1]) * shared
            longest = max(len(ids), *(len(sequences[other]) for other in rows[-1]))
            if joined <= length + len(ids) * 3 // 4 and joined <= max(MOST_ROW, 2 * longest):
                rows[-1].append(number)
                trunk, length, total = shared, joined, total + len(ids)
                continue
        rows.append([number])
        trunk, length, total = len(ids), len(ids), len(ids)
    return rows


def _units(removed) -> Iterable[int]:
    """Units as the harness's command line hands them over: text, one number, or a list."""
    if isinstance(removed, str):
        return parse_removed(removed)
    return (removed,) if isinstance(removed, int) else removed


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if re.fullmatch(r"-?[\d-]+", name):  # the harness splits removed=9,10 at the comma
            raise InputError(f"{what}: {name!r} has no value; write units as removed=9-11 or removed=[9,10]")
        if name not in known:
            raise InputError(f"{what}: unknown name {name!r}; {nearest(name, known)}")


def plain(result: Mapping) -> dict:
    """A result of the harness as values that JSON has."""
    return json.loads(json.dumps(result, default=utils.handle_non_serializable))


def main() -> None:
    """The harness's own command line, for releases of it that know no models but their own."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        print(f"fastprune: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
