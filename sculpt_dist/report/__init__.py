"""What people read of a run: the report page, its figures, and the model card.

`report` writes the report of a run folder: `record` reads the folder, with the lines of metrics.jsonl from `steps`, and
`shapes` checks the values; `listed` reads images.csv. `summary` computes the numbers, `figures` and `grid` draw, and
`page` renders the HTML. `render` fills in the templates. `card` writes the README of an exported model. The templates
of the reports of comparisons and sweeps live here as well, and the figures of a sweep (`sweep_figures`). Only this
package imports matplotlib and jinja2. matplotlib, PIL and jinja2 are imported inside functions only. Layers above
(`track`, `run`, `experiments`, `cli`) may import it.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.report.card import model_card
    from sculpt_dist.report.figures import draw_pngs
    from sculpt_dist.report.record import RunRecord, read_run
    from sculpt_dist.report.report import draw_stage, write_report
    from sculpt_dist.report.steps import read_metrics
    from sculpt_dist.report.summary import seen_counts, summarise
    from sculpt_dist.report.sweep_figures import draw_front, draw_parameters

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "card": ["model_card"],
        "figures": ["draw_pngs"],
        "sweep_figures": ["draw_front", "draw_parameters"],
        "record": ["RunRecord", "read_run"],
        "report": ["draw_stage", "write_report"],
        "steps": ["read_metrics"],
        "summary": ["seen_counts", "summarise"],
    },
)
