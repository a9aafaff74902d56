"""The embedded worlds: small sets of images with names, and the tiny, real pipelines that were trained to draw them.

Each folder is one world: `canvas` is drawn by code, `gallery` is made of pictures. Its `world.py` names the objects,
styles and captions and imports nothing but `base`; its `pictures.py` makes the images. `find` finds a world by its
name. `classifier`, `pretrain` (with the loop in `training`) and `measure` build what `assets/` ships.
`backbones` and `data` never import this package; `evaluation` and the layers above may.
"""
