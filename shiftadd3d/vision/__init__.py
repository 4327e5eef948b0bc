"""Image classification with ShiftAdd vision transformers: fine-tune in the paper's stages, evaluate, predict, export.

`settings` holds all options and imports nothing heavy. `data` reads pictures, `engine` trains and evaluates one model,
`finetune` runs the stages, and `checkpoint` saves and loads.
"""
