"""The layer-schedule engine: runs a pipeline's stages inside an unmodified transformers decoder.

schedule.py  which stage is asked where, per sequence; no tensors
feasible.py  whether a pipeline can act and meet its budget, before anything runs
asked.py     what strategies are shown and what they answer, taken on trust in neither
sequence.py  one sequence's tokens, and what a stage sees of them
forward.py   one forward of one attachment: batches, rotary positions, masks, deepstack rows
kv.py        stages at `kv` sites
receipt.py   the trace of a forward that has ended
cache.py     KV cache layers that hold their own tokens and report logical lengths
adopted.py   a user's own cache: refused, adopted, restored
reading.py   how much attention each token received
tap.py       the way into attention: masks, row sums, spans
parallel.py  attention heads that are spread over several processes
hooks.py     hooks that do no harm on copies, in pickles and after detach
layers.py    the hooks inside the layers, on while a forward reduces
compiled.py  one forward of a compiled model
steps.py     what a compiled graph knows of a forward before it runs
operators.py the operators that act for the engine in a graph
traced.py    the hooks inside the layers of a compiled model
host.py      the model: its facts, the hooks around its decoder, its configuration
probe.py     proves on the real layers what an adapter says about them
meter.py     what the layers really cost, against what the configuration says
vision.py    stages in the vision tower
frames.py    frames taken out before a tower and put back behind it
call.py      one call of the decoder: its layout, its sequences
stack.py     what called, read from the stack
checks.py    what is refused by name
waiting.py   waiting for forwards of other threads
ongoing.py   the forwards that go on, in whatever thread
step.py      a step of decoding that only goes on
run.py       a pipeline on a model: how a forward begins and ends
attach.py    attach, reduce, detach
stream.py    a sequence that comes in chunks: pieces of it through the decoder
streamed.py  what a stream has been fed and has done, and its receipt
"""
