"""Parses the PTX that Triton compiles: one kernel, its parameters, registers and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Fault(Exception):
    """A kernel did what a card would not do, or what this executor does not know."""


class Parameter(NamedTuple):
    name: str
    size: int  # bytes


@dataclass(frozen=True)
class Instruction:
    """`@!guard opcode operands;`"""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None  # a predicate register; None: every thread runs it
    negated: bool = False  # runs where the guard is false

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Kernel:
    name: str
    threads: int  # of a program
    params: list[Parameter]
    registers: dict[str, str] = field(default_factory=dict)  # prefix or name -> declared type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of an instruction
    code: list | None = None  # the instructions as functions, once they are decoded

    def register_type(self, name: str) -> str:
        """The declared type of a register: "pred", "b16", "b32" or "b64"."""
        declared = self.registers.get(name) or self.registers.get(name.rstrip("0123456789"))
        if declared is None:
            raise Fault(f"{self.name}: register {name} is not declared")
        return declared


def parse(source: str) -> Kernel:
    """The one kernel of a module.

    Args:
        source: PTX as Triton gives it, one `.entry`.
    """
    source = re.sub(r"//[^\n]*", "", source)
    source = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", source, flags=re.MULTILINE)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*\.reqntid\s+(\d+)[^{]*\{", source, re.DOTALL)
    if head is None:
        raise Fault("no .entry with .reqntid in the PTX")
    params = [_parameter(text) for text in _split(head[2])]
    kernel = Kernel(head[1], int(head[3]), params)
    _Body(kernel).read(source[head.end() :])
    return kernel


def _parameter(text: str) -> Parameter:
    match = re.fullmatch(r"\.param\s+.*?\.[busf](\d+)\b.*?(\w+)(?:\[(\d+)\])?", text, re.DOTALL)
    if match is None:
        raise Fault(f"parameter {text!r} is not understood")
    return Parameter(match[2], int(match[1]) // 8 * int(match[3] or 1))


# A statement begins with one of these, or ends with a semicolon.
_STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+):|(?P<text>[^;]+?)\s*;)"
)


class _Body:
    """Inline assembly stands in braces; what it declares is known there only. Such a name, when it
    comes a second time, is another register or label: it gets the number of its braces."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scopes: list[str] = []  # suffixes of the names that are declared in open braces
        self.count = 0

    def read(self, text: str) -> None:
        place = 0
        while match := _STATEMENT.match(text, place):
            place = match.end()
            if match["open"]:
                self.count += 1
                self.scopes.append(f"#{self.count}")
            elif match["close"]:
                if not self.scopes:
                    return
                self.scopes.pop()
            elif match["label"]:
                self.kernel.labels[self._local(match["label"])] = len(self.kernel.instructions)
            elif match["text"].startswith(".reg"):
                self._declare(match["text"])
            elif not match["text"].startswith(".pragma"):
                self.kernel.instructions.append(self._instruction(match["text"]))
        raise Fault(f"{self.kernel.name}: the body does not end")

    def _local(self, name: str) -> str:
        """Names that the compiler makes have a % or $; those of inline assembly have not."""
        bare = re.fullmatch(r"[A-Za-z_]\w*", name) and name != "global_smem"
        if self.scopes and bare and not name.startswith(self.kernel.name):
            return name + self.scopes[-1]
        return name

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            self.kernel.registers[self._local(re.sub(r"<\d+>", "", name.strip()))] = kind[1:]

    def _instruction(self, text: str) -> Instruction:
        match = re.fullmatch(r"(?:@(!?)(\S+)\s+)?(\S+)\s*(.*)", text, re.DOTALL)
        operands = tuple(self._local(operand) for operand in _split(match[4]))
        guard = match[2] and self._local(match[2])
        return Instruction(match[3], operands, guard, match[1] == "!")


def _split(text: str) -> list[str]:
    """Cuts at commas that stand in no brackets, which may be nested once."""
    text = " ".join(text.split())
    parts = re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|[^,\[{])+", text)
    return [part.strip() for part in parts if part.strip()]
