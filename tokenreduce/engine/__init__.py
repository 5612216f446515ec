"""The layer-schedule engine: runs a pipeline's stages inside an unmodified transformers decoder.

schedule.py  which stage is asked where, per sequence; no tensors
sequence.py  one sequence's tokens, and what a stage sees of them
forward.py   one forward of one attachment: batches, rotary positions, masks, deepstack rows
cache.py     KV cache layers that hold their own tokens and report logical lengths
tap.py       the way into attention: masks, importance, spans
attach.py    hooks on and off; checks of model, cache and mode
"""
