"""A small language model that was really trained, with its calibration and held-out data.

Only paths live here, so importing this costs nothing; `fastprune.demo.train` makes what they point
to.
"""

from pathlib import Path

WINDOW = 256  # tokens of a calibration window of the text
HERE = Path(__file__).resolve().parent
MODEL_DIR = HERE / "model"
TEXT = HERE / "data" / "text.jsonl"
QUESTIONS = HERE / "data" / "questions.jsonl"
TEXT_HELDOUT = HERE / "data" / "text-heldout.jsonl"
QUESTIONS_HELDOUT = HERE / "data" / "questions-heldout.jsonl"
