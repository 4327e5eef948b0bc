"""Image classification with ShiftAdd vision transformers: fine-tune in the paper's stages, evaluate, predict, export.

`settings` says what to do and imports nothing heavy; `data` reads pictures, `engine` trains and evaluates one model,
`finetune` runs the stages, `checkpoint` saves and loads.
"""
