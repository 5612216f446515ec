"""LLaVA-Video: `modeling` is the native model, `family` reads upstream checkpoints and makes the inputs.

`models.loading` calls the family, and whoever needs the model's class takes it from `modeling`. Nothing here knows of
other families.
"""
