"""Parts of a run, resolved from a configuration as a run resolves them."""

from __future__ import annotations

from pathlib import Path

from sculpt_dist.config.schema import RunConfig
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.methods.base import Editor, Method, load_method
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.plan import Plan, make_plan
from sculpt_dist.run.setup import RunSetup


def method_of(config: RunConfig) -> Method | Editor:
    return load_method(config.method)


def plan_of(config: RunConfig, method: Method | None = None) -> Plan:
    return make_plan(config.train, config.mask, config.engine, method or load_method(config.method))


def setup_of(config: RunConfig) -> RunSetup:
    """As `resolve`, also of a configuration without concepts."""
    method = load_method(config.method)
    plan = plan_of(config, method) if isinstance(method, Method) else None
    return RunSetup(
        config, method, plan, tuple(concept_prompts(concept, config.prepare) for concept in config.concepts)
    )


def backbone_of(config: RunConfig, group):
    return open_backbone(config.model, group, Path(config.run.folder))
