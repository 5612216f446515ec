"""The host model and the way into it.

Here live the facts of a decoder (`host`), hooks that do no harm on copies and after detach (`hooks`), the tap around
its attention function (`tap`), the probe that proves an adapter right and measures what layers cost (`probe`,
`meter`), what only this thread's call stack tells (`callers`, whose names `private_names` proves) and what a forward
holds while it runs (`leases`). The rooms of a forward, of a compiled forward and of the
tower call in here, and so does `run`; this room calls `cache` alone.
"""
