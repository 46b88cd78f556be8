"""Workers that run in this process, one after the other, so that they can be watched and broken."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch

from fastprune.workers.messages import Word
from fastprune.workers.processes import Workers
from fastprune.workers.transfer import fill, places
from fastprune.workers.worker import Worker


class InThisProcess(Workers):
    """Workers that do at once what they are asked; lose: numbers of the words upon which the one
    that says it dies."""

    def __init__(self, count: int, lose: tuple[int, ...] = ()):
        super().__init__(count, count)
        self.words: deque[tuple] = deque()
        self.lose, self.heard = set(lose), 0
        self.requests: list[tuple[int, str]] = []
        self.workers = [self._make(worker) for worker in range(count)]

    def _make(self, worker: int) -> Worker:
        return Worker(lambda word: self.words.append((worker, word)), lambda: False)

    def _start(self, worker: int) -> None:
        self.workers[worker] = self._make(worker)

    def _send(self, worker: int, request: tuple) -> None:
        self.requests.append((worker, type(request).__name__))
        self.workers[worker].answer(request)

    def _receive(self):
        self.heard += 1
        if self.heard in self.lose:
            worker = self.words[0][0]
            self.words = deque(word for word in self.words if word[0] != worker)
            return worker, Word("lost", "it was asked to")
        return self.words.popleft()

    def share_tensors(self, tensors):
        at, size = places(tensors)
        storage = torch.UntypedStorage(size)
        fill(torch.tensor([], dtype=torch.uint8).set_(storage).numpy(), tensors, at)
        return at, storage, None


def set_trap(folder: Path) -> Path:
    """Put Python files into a folder that are named as modules which a worker imports. The file
    that is returned appears once one of them runs."""
    sprung = folder / "sprung"
    names = ("torch", "numpy", "fastprune", "transformers", "sitecustomize", "usercustomize")
    for name in (*names, "pickle", "linecache", "runpy", "signal", "encodings", "aiohttp"):
        (folder / f"{name}.py").write_text(f"open({str(sprung)!r}, 'a').write({name!r})\n")
    return sprung
