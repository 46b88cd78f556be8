"""Studies: many searches, compared, in a folder that continues after a kill, and shown as one page.

Imported without torch, so that the command line can refuse a wrong folder at once.
"""

from .checks import check_study
from .config import Document, StudyConfig, read_document
from .controls import Control
from .folder import Cell, check_study_folder
from .report import write_report
from .runs import run_study
from .statistics import summarise

__all__ = [
    "Cell",
    "Control",
    "Document",
    "StudyConfig",
    "check_study",
    "check_study_folder",
    "read_document",
    "run_study",
    "summarise",
    "write_report",
]
