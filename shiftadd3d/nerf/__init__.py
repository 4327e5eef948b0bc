"""The nerfstudio method: data parsers, source views, data manager, model and pipeline.

Only this package (and the nerfstudio half of ``shiftadd3d.configs``) imports nerfstudio. Nothing is imported here:
nerfstudio loads ``shiftadd3d.nerf.dataparsers`` while it still imports its own configs, and imports from here would run
in the middle of that.
"""
