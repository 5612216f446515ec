"""One forward of a decoder with a pipeline attached.

A call is read (`call`), its rows become sequences (`sequence`) in a batch (`batch`), the hooks in the layers
(`layer_hooks`) hand the residual stream to the forward's state (`state`), which asks the stages (`looks`,
`kv_stages`) with the attention that they may read (`importance`), and the receipt is written at the end (`receipt`);
a step of decoding in which nothing is to be done has a state of its own (`decode_step`). `run`, `active`, `compiled`,
`tower` and `streaming` call in here; this room calls `model` and `cache`.
"""
