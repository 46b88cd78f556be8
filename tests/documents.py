"""Study documents for tests, written from plain values."""

from __future__ import annotations

import json
from pathlib import Path


def write_document(path: Path, **tables) -> Path:
    """Write tables as TOML: a dict as a table, a list of dicts as an array of tables."""
    path.write_text(document_text(tables), encoding="utf-8", errors="surrogatepass")
    return path


def document_text(tables: dict) -> str:
    """The TOML of a document; plain values come first, as TOML wants."""
    order = sorted(
        tables.items(), key=lambda item: isinstance(item[1], dict) or _is_tables(item[1])
    )
    parts = []
    for name, value in order:
        if _is_tables(value):
            parts += [f"[[{json.dumps(name)}]]\n{_lines(table)}" for table in value]
        elif isinstance(value, dict):
            inner = {key: of for key, of in value.items() if isinstance(of, dict)}
            outer = {key: of for key, of in value.items() if key not in inner}
            parts.append(f"[{json.dumps(name)}]\n{_lines(outer)}")
            for key, tables_of in inner.items():
                parts += [
                    f"[{json.dumps(name)}.{json.dumps(key)}.{json.dumps(of)}]\n{_lines(table)}"
                    for of, table in tables_of.items()
                ]
        else:
            parts.append(_lines({name: value}))
    return "\n".join(parts)


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _lines(table: dict) -> str:
    return "".join(f"{json.dumps(key)} = {_value(value)}\n" for key, value in table.items())


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_value(of)}' for key, of in value.items())}}}"
    return (
        repr(value)
        if isinstance(value, float)
        else json.dumps(str(value) if isinstance(value, Path) else value)
    )


def text_study(model: object, file: object, /, **changes) -> dict:
    """The tables of a small study of one text under perplexity. changes: whole tables, or
    search's keys as search_NAME."""
    search = {"num_remove": [1], "algorithms": ["one_shot"]}
    tables = {
        "model": {"path": str(model)},
        "calibration": [
            {"name": "text", "kind": "text", "file": str(file), "num_samples": 2, "seq_len": 16}
        ],
        "search": search,
    }
    for name, value in changes.items():
        if name.startswith("search_"):
            search[name.removeprefix("search_")] = value
        else:
            tables[name] = value
    return tables
