"""Scenes for training: objects cut out here and pasted there, with labels that are exact.

`Cutouts` reads objects and `Backgrounds` what they are pasted onto. A `SceneComposer` makes scene k from (seed, k) and
a `Recipe` (`preset`) of places, sizes and blends; its `Labels` are of what is visible in the end. `compose` writes a
COCO data set with all cores, as the command `fastnuggets compose` does; `PasteDataset` makes scenes while a network
trains. Blending itself is in `fastnuggets.ops`, and `fastnuggets.nn.RandomPaste` pastes into batches on a device.

`SupportSurfaces` finds in depth where objects can stand, and how large; `TextPainter` writes onto plain regions, in
their plane, and `paste_text` is the last stage of SynthText; `render_scene` casts shapes whose image, depth, flow and
labels are all known.

Needs the extra ``fastnuggets[scenes]`` as soon as a file is touched.
"""

from fastnuggets.scenes.backgrounds import Background, Backgrounds, Known
from fastnuggets.scenes.blending import Motion
from fastnuggets.scenes.coco import CocoWriter, coco_annotations
from fastnuggets.scenes.compose import Composed, compose
from fastnuggets.scenes.composer import Scene, SceneComposer
from fastnuggets.scenes.cutouts import Cutout, Cutouts, grabcut
from fastnuggets.scenes.dataset import PasteDataset
from fastnuggets.scenes.geometry import (
    Camera,
    Planes,
    fit_plane,
    fit_planes,
    homography,
    plane_depth,
    project,
    unproject,
)
from fastnuggets.scenes.images import BrokenFileError
from fastnuggets.scenes.labels import Instance, Labels, Placed
from fastnuggets.scenes.recipes import ALL_BLENDS, PRESETS, Recipe, preset
from fastnuggets.scenes.render import Rendering, Shape, Texture, World, pose, random_scene, render_scene
from fastnuggets.scenes.surfaces import Face, Places, Support, SupportSurfaces, faces, segment
from fastnuggets.scenes.synthtext import paste_text
from fastnuggets.scenes.text import PaintedText, TextPainter

__all__ = [
    "ALL_BLENDS",
    "PRESETS",
    "Background",
    "Backgrounds",
    "BrokenFileError",
    "Camera",
    "CocoWriter",
    "Composed",
    "Cutout",
    "Cutouts",
    "Face",
    "Instance",
    "Known",
    "Labels",
    "Motion",
    "PaintedText",
    "PasteDataset",
    "Placed",
    "Places",
    "Planes",
    "Recipe",
    "Rendering",
    "Scene",
    "SceneComposer",
    "Shape",
    "Support",
    "SupportSurfaces",
    "TextPainter",
    "Texture",
    "World",
    "coco_annotations",
    "compose",
    "faces",
    "fit_plane",
    "fit_planes",
    "grabcut",
    "homography",
    "paste_text",
    "plane_depth",
    "pose",
    "preset",
    "project",
    "random_scene",
    "render_scene",
    "segment",
    "unproject",
]
