"""The tables of README and docs, written from bench/results: `python -m tools.tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in a page; `markers` writes it
there, and a test finds every one up to date. `pages` has a module for each page, with the rows and
columns of its tables, which `render` turns into Markdown. `registry` says by which command each
measured table and figure was made: `python -m tools.tables --evidence`.

A new table takes three steps: its rows and columns in the module of its page, its markers in the
page, and its command and file of results in bench/evidence.toml.
"""
