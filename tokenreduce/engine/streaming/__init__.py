"""A sequence that is fed chunk by chunk (`tr.stream`).

`stream` runs pieces of it through the decoder as they become ready; `progress` keeps what was fed, what was done, and
writes the receipt. Users enter by `tr.stream`; nothing in the engine calls in here.
"""
