"""The command line runs in this process and imports transformers without accelerate, which other
tests need of it: here transformers comes whole, before the first command."""

from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401 (loaded whole, before the first command)
