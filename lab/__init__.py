"""What only the authors run, outside the wheel: `reproduce` remakes the paper's tables, `training` remade the embedded model.

The laboratory imports tokenreduce; tokenreduce never imports the laboratory.
"""
