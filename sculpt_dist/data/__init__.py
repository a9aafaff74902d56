"""Training data: prompts, shards of latents, and the streams of batches.

`prompts` fills templates, `prompt_files` reads the user's lists and `images` their image files. `shards` stores latents
in tars; `streams` turns `sources` of them into batches that do not depend on the number of ranks. Only this folder
imports webdataset. It knows no model; every layer above may import it.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.data.images import IMAGE_TYPES, image_files, open_image, own_images
    from sculpt_dist.data.prompt_files import ListedPrompt, read_prompts
    from sculpt_dist.data.prompts import ConceptPrompts, concept_prompts, fill, naming
    from sculpt_dist.data.shards import Sample, ShardReader, ShardRecord, read_index, write_index, write_shard
    from sculpt_dist.data.streams import ConceptStreams, Draws, Layout, StreamSpec, micro_batches

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "images": ["IMAGE_TYPES", "image_files", "open_image", "own_images"],
        "prompt_files": ["ListedPrompt", "read_prompts"],
        "prompts": ["ConceptPrompts", "concept_prompts", "fill", "naming"],
        "shards": ["Sample", "ShardReader", "ShardRecord", "read_index", "write_index", "write_shard"],
        "streams": ["ConceptStreams", "Draws", "Layout", "StreamSpec", "micro_batches"],
    },
)
