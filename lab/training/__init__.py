"""Training of the embedded model (`make train-testbed`): curriculum, lessons, the encoder, the trainer and its evaluation.

Its product, the weights in `tokenreduce/testbed/weights`, is in the wheel; this code is not.
"""
