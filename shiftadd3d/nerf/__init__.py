"""The nerfstudio method: data parsers, source views, data manager, model and pipeline.

Only this package (and the nerfstudio half of ``shiftadd3d.configs``) imports nerfstudio. Nothing is imported here:
nerfstudio loads ``shiftadd3d.nerf.dataparsers`` while its own configs are still being imported, so whatever this module
imported would run in the middle of that.
"""
