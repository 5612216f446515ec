"""What a pipeline will hold and cost on a decoder, from token counts alone: FLOPs, bytes, budgets, and who acts where.

Nothing here makes a tensor, needs weights or knows a strategy by name. Planning stands above the pipeline, the checks of
plugins and the contracts of strategies, and below the engine; the command line, the comparison and the engine call it.
"""
