"""What backbones are composed of, one concern per file.

`components` loads a folder's models, `embeddings` keeps prompt embeddings, `schedules` corrupts latents; `guidance`,
`sampling` and `trajectory` draw; `sizes`, `conditions` and `groups` describe the net; `lora` adds and merges adapters;
`text` and `stable` are shared by several kinds; `tiny` builds models for a CPU. Every layer above may import these.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.backbones.parts.components import Components, model_class
    from sculpt_dist.backbones.parts.embeddings import PromptEmbeddings
    from sculpt_dist.backbones.parts.groups import attention_role, parameter_groups
    from sculpt_dist.backbones.parts.guidance import Guided, classifier_free
    from sculpt_dist.backbones.parts.options import Options, Tiny
    from sculpt_dist.backbones.parts.schedules import DiscreteSchedule, FlowSchedule, Schedule
    from sculpt_dist.backbones.parts.trajectory import Trajectory

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "components": ["Components", "model_class"],
        "embeddings": ["PromptEmbeddings"],
        "groups": ["attention_role", "parameter_groups"],
        "guidance": ["Guided", "classifier_free"],
        "options": ["Options", "Tiny"],
        "schedules": ["DiscreteSchedule", "FlowSchedule", "Schedule"],
        "trajectory": ["Trajectory"],
    },
)
