"""The tables of each page, in a module of its name, and all of them together."""

from __future__ import annotations

import importlib
import pkgutil

from ..render import Table

MODULES = [
    importlib.import_module(f".{page.name}", __name__) for page in pkgutil.iter_modules(__path__)
]
TABLES: dict[str, Table] = {
    name: table for module in MODULES for name, table in module.TABLES.items()
}
