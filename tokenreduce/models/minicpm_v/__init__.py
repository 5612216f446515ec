"""MiniCPM-V 2.6: native model (`modeling`, `vision`), inputs (`processing`) and upstream checkpoints (`family`).

`models.loading` calls the family, and whoever needs the model's class takes it from `modeling`. Nothing here knows of
other families.
"""
