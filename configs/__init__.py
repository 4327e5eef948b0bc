"""Presets: nerfstudio method specifications, recipes and training presets."""
