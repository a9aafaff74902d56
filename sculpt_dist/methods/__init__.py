"""The methods: each file beside `base` is one paper, and its name is a `method.name`.

`base` holds what a method is (`Method` trains, `Editor` edits in closed form) and what it sees of a step. A new method
is one new file here. Imported by `run` and above; methods import `backbones`, `engine` and `data`, never `run`.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.methods.base import Editor, Method, Predictor, Setup, Step, load_method, matrices

__getattr__, __dir__ = lazy_exports(
    __name__, {"base": ["Editor", "Method", "Predictor", "Setup", "Step", "load_method", "matrices"]}
)
