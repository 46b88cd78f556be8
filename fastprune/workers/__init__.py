"""Calls shared out over workers: who runs what (`split`), an engine that asks them (`coordinator`),
one of them (`worker`), and those of this machine (`processes`); those on Ray are
`integrations.distributed`."""
