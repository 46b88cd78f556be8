"""Paths of a small trained language model, and of its calibration and held-out data.

`tools/demo_model` in the repository trains the model and draws the data.
"""

from pathlib import Path

WINDOW = 256  # tokens of a calibration window of the text
HERE = Path(__file__).resolve().parent
MODEL_DIR = HERE / "model"
TEXT = HERE / "data" / "text.jsonl"
QUESTIONS = HERE / "data" / "questions.jsonl"
TEXT_HELDOUT = HERE / "data" / "text-heldout.jsonl"
QUESTIONS_HELDOUT = HERE / "data" / "questions-heldout.jsonl"
STUDY = HERE / "study.toml"
QUICK_STUDY = HERE / "quick.toml"
