"""Calls shared out over workers.

`remote` splits a call and sends the parts, `worker` runs one part, `messages` are the requests and
answers. `processes` are workers of this machine, `ray` those of a cluster.
"""
