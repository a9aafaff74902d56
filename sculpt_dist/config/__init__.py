"""The configuration of a run: its keys, how files and overrides become one, and the reference of all keys.

`schema` declares the keys of a run, `experiments` those of comparison and sweep files. `load` merges defaults, yaml
files and overrides; `packaged` finds the files that come with the program; `checks` refuses what cannot work;
`interpolation` keeps values of the environment out of all files; `reference` reads the documentation of keys from the
source. All packages above may import it; it imports only `core`.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.config.checks import check_batch, normal
    from sculpt_dist.config.load import load_config, merge_section, plain_values, to_yaml
    from sculpt_dist.config.reference import reference_markdown
    from sculpt_dist.config.schema import Concept, RunConfig

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "checks": ["check_batch", "normal"],
        "load": ["load_config", "merge_section", "plain_values", "to_yaml"],
        "reference": ["reference_markdown"],
        "schema": ["Concept", "RunConfig"],
    },
)
