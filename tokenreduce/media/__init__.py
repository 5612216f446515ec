"""Videos in, pictures out: `video` decodes files, `pictures` draws what became of tokens, `sheet` lays pictures out.

No model and no pipeline is known here; pictures are drawn from arrays and a `TokenLayout`. models, compare, the command
line and the laboratory call it.
"""
