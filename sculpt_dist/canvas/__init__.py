"""The canvas: a small drawn world for tests and examples, and the tiny models that draw it.

`world` names its objects, styles and captions and imports nothing else. `draw` makes drawings, `classifier` recognises
them. `pretrain` builds everything that is shipped in `assets/canvas`, and `measure` checks what those models draw.
`backbones` never import this package; `data`, `evaluation` and `cli` may.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.canvas.classifier import CanvasClassifier, load_classifier, save_classifier, train_classifier
    from sculpt_dist.canvas.draw import draw_dataset
    from sculpt_dist.canvas.pretrain import build_canvas
    from sculpt_dist.canvas.world import OBJECTS, STYLES, SUPERCLASS_OF, SUPERCLASSES, WORDS, prompt

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "classifier": ["CanvasClassifier", "load_classifier", "save_classifier", "train_classifier"],
        "draw": ["draw_dataset"],
        "pretrain": ["build_canvas"],
        "world": ["OBJECTS", "STYLES", "SUPERCLASSES", "SUPERCLASS_OF", "WORDS", "prompt"],
    },
)
