"""The plan: counts by hand, changes that fit, and its peaks against those of real engines, measured."""

from __future__ import annotations

import itertools
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from big_models import SANA, UNET, write_model
from harness import PROJECT, launch, launch_anew, sculpt
from setups import backbone_of, method_of

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import ConceptBatch, Stream
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.data.streams import Draws
from sculpt_dist.maths.planning import Rates
from sculpt_dist.methods.base import Predictor, Step
from sculpt_dist.planning.plan import plan_run
from sculpt_dist.planning.rates import read_rates
from sculpt_dist.planning.rehearsal import rehearse
from sculpt_dist.planning.subject import Subject

CANVAS = PROJECT / "configs" / "canvas" / "dm_cal.yaml"
CONCEPT = "concepts=[{target: bird, superclass: animal}]"
THREE_STEPS = [
    "train.steps=2",
    "mask.collect=1",
    "mask.refresh=1",
    "train.checkpoint_every=0",
    "evaluate.enabled=false",
]
MEASURED = {  # what is measured: ranks, kind, stored as, overrides
    "stage 0": (1, "sana", torch.bfloat16, ["engine.stage=0", "train.batch=2"]),
    "stage 1": (2, "sana", torch.bfloat16, ["engine.stage=1", "train.batch=4"]),
    "stage 2": (2, "sana", torch.bfloat16, ["engine.stage=2", "train.batch=4"]),
    "stage 3": (2, "sana", torch.bfloat16, ["engine.stage=3", "train.batch=4"]),
    "stage 2, bf16": (1, "sana", torch.float32, ["engine.stage=2", "engine.precision=bf16", "train.batch=2"]),
    "stage 3, bf16": (2, "sana", torch.float32, ["engine.stage=3", "engine.precision=bf16", "train.batch=4"]),
    "stage 2, accumulation": (1, "sd15", torch.bfloat16, ["engine.stage=2", "train.batch=4", "train.accumulate=2"]),
    "stage 2, open moments": (
        1,
        "sana",
        torch.bfloat16,
        ["engine.stage=2", "train.batch=2", "engine.moments=open", "mask.keep=0.1"],
    ),
    "stage 2, activations again": (
        1,
        "sana",
        torch.bfloat16,
        ["engine.stage=2", "train.batch=2", "engine.checkpointing=true"],
    ),
    "stage 3, few gathered": (2, "sana", torch.bfloat16, ["engine.stage=3", "train.batch=4", "engine.gathered=2e7"]),
    "stage 2, all trains": (2, "sd15", torch.bfloat16, ["engine.stage=2", "train.batch=2", "method.name=salun"]),
    "stage 3, all trains, two loss groups": (
        2,
        "sana",
        torch.bfloat16,
        ["engine.stage=3", "train.batch=2", "method={name: rgd, trains: all}"],
    ),
}
SETTINGS = {"sana": SANA, "sd15": UNET}
SMALLER = {  # of 25 to 58 M parameters
    "sana": SANA | {"num_layers": 3},
    "sd15": UNET | {"block_out_channels": [128, 256, 256], "transformer_layers_per_block": [1, 1, 2]},
    "sdxl": UNET
    | {
        "block_out_channels": [128, 256, 256],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 160,
        "projection_class_embeddings_input_dim": 144,
    },
}
COMBINED = {  # the same of smaller nets, with choices that are not alone
    "stage 0, open moments, sdxl": (
        1,
        "sdxl",
        torch.bfloat16,
        ["engine.stage=0", "train.batch=2", "engine.moments=open", "mask.keep=0.2"],
    ),
    "stage 1, one rank, activations again, sd15": (
        1,
        "sd15",
        torch.bfloat16,
        ["engine.stage=1", "train.batch=4", "engine.checkpointing=true"],
    ),
    "stage 1, open moments, sdxl": (
        2,
        "sdxl",
        torch.bfloat16,
        ["engine.stage=1", "train.batch=4", "engine.moments=open", "mask.keep=0.2"],
    ),
    "stage 2, bf16, open moments, activations again, sana": (
        2,
        "sana",
        torch.float32,
        [
            "engine.stage=2",
            "engine.precision=bf16",
            "train.batch=4",
            "engine.moments=open",
            "mask.keep=0.2",
            "engine.checkpointing=true",
        ],
    ),
    "stage 3, open moments, sd15": (
        2,
        "sd15",
        torch.bfloat16,
        ["engine.stage=3", "train.batch=4", "engine.moments=open", "mask.keep=0.2"],
    ),
    "stage 3, one rank, activations again, accumulation, sana": (
        1,
        "sana",
        torch.bfloat16,
        ["engine.stage=3", "train.batch=4", "train.accumulate=2", "engine.checkpointing=true"],
    ),
}
BY_DEFAULT = ("stage 1, one rank, activations again, sd15",)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of at least `least` parameters, each written when it is first asked for, as another type than it runs in: mapped
    files are not counted.
    """
    folder, written = tmp_path_factory.mktemp("models"), {}

    def model(arch, dtype, settings=SETTINGS, least=100e6):
        key = (arch, dtype, least)
        if key not in written:
            written[key] = folder / f"{arch}-{dtype}-{least:g}"
            assert write_model(written[key], arch, settings[arch], dtype) > least
        return written[key]

    return model


def measure(ranks: int, arguments: list[str], kept: str = "16384") -> list[dict]:
    """What the ranks tell. `kept`: see footprint.py. With more than 16 KiB, the heap of a small net kept 50 MB that
    nothing used.
    """
    printed = launch(ranks, str(PROJECT / "tests" / "workers" / "footprint.py"), kept, *arguments, timeout=600)
    return json.loads(next(line for line in printed.splitlines() if line.startswith("[{")))


def predicted_and_measured(case, ranks, overrides, arch, model, folder):
    """The plan and what the ranks tell, once their peaks are within a tenth of each other."""
    settings = [f"model.arch={arch}", f"model.path={model}", CONCEPT, f"run.folder={folder}", *THREE_STEPS, *overrides]
    predicted = plan_run(load_config(None, settings), ranks, 1e12, device="cpu")
    told = measure(ranks, settings)
    measured = max(rank["peak"] for rank in told)
    print(
        f"\n{case}: {ranks} ranks, {predicted['parameters'] / 1e6:.1f} M parameters, predicted "
        f"{predicted['peak'] / 1e9:.3f} GB, measured {measured / 1e9:.3f}: {predicted['peak'] / measured - 1:+.1%}"
    )
    assert told[0]["trained"] == predicted["trainable"]
    assert predicted["peak"] == pytest.approx(measured, rel=0.1)
    return predicted, told


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in BY_DEFAULT else pytest.mark.huge) for case in COMBINED],
)
def test_the_peak_of_combined_choices_is_predicted_within_a_tenth(case, models, tmp_path):
    ranks, arch, dtype, overrides = COMBINED[case]
    predicted_and_measured(case, ranks, overrides, arch, models(arch, dtype, SMALLER, 20e6), tmp_path / "run")


@pytest.mark.two_ranks
@pytest.mark.huge
@pytest.mark.parametrize("case", MEASURED)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(case, models, tmp_path):
    ranks, arch, dtype, overrides = MEASURED[case]
    predicted, told = predicted_and_measured(case, ranks, overrides, arch, models(arch, dtype), tmp_path / "run")
    assert predicted["parameters"] > 100_000_000
    steps = told[0]["steps"]
    sent = steps[-1]["bytes"] - steps[-2]["bytes"]
    print(f"payload of a step: predicted {sum(predicted['payload'].values()) / 1e9:.3f} GB, counted {sent / 1e9:.3f}")
    if "two loss groups" not in case:  # in stage 3 DeepSpeed then gathers once more than planned
        assert sum(predicted["payload"].values()) == pytest.approx(sent, rel=0.1)


TIMED = [
    "model.arch=sana",
    CONCEPT,
    "train.steps=10",
    "mask.collect=1",
    "mask.refresh=0",
    "train.checkpoint_every=0",
    "engine.stage=2",
    "evaluate.enabled=false",
]


def seconds(told: list[dict], part: str = "") -> float:
    """The median over the steps of rank 0, the first three left out, of a part or of all."""
    return statistics.median(step["seconds"] * (step[part] if part else 1) for step in told[0]["steps"][3:])


@pytest.mark.huge
def test_the_step_on_two_ranks_is_predicted_from_one_rank_and_the_collectives(tmp_path):
    """To be run on a machine of 2 cores that does nothing else.

    57.7 M parameters; 64 tokens and 2 samples of each stream per rank.
    """
    write_model(tmp_path / "model", "sana", SANA | {"num_layers": 3}, torch.bfloat16)
    settings = [f"model.path={tmp_path / 'model'}", *TIMED]

    def run(ranks: int, name: str) -> list[dict]:
        return measure(ranks, [*settings, f"train.batch={2 * ranks}", f"run.folder={tmp_path / name}"], kept="usual")

    alone = [run(1, "first")]
    with ThreadPoolExecutor(2) as both:
        crowded = list(
            both.map(lambda name: run(1, name), ("left", "right"))
        )  # two runs that know nothing of each other
    two = run(2, "two")
    alone.append(run(1, "last"))
    rates = json.loads(launch_anew(2, "-m", "sculpt_dist", "bench", "comm", "--json").strip().splitlines()[-1])
    one, measured = statistics.mean(map(seconds, alone)), seconds(two)
    at_once = statistics.mean(map(seconds, crowded))
    computing = statistics.mean(seconds(told, "forward") + seconds(told, "backward") for told in crowded)
    updating = statistics.mean(seconds(told, "step") for told in crowded)
    config = load_config(None, [*settings, "train.batch=4"])
    found = plan_run(config, 2, 1e12, device="cpu")
    known = tmp_path / "rates.json"
    known.write_text(
        json.dumps(
            rates
            | {
                "flops_per_second": found["flops_per_step"] / computing,
                "masked_step_ns_per_weight": updating / found["trainable"] * 1e9,
            }
        )
    )
    predicted = plan_run(config, 2, 1e12, read_rates([known], None, None, None), "cpu")
    figures = {
        "one": one,
        "two unrelated": at_once,
        "two ranks": measured,
        "in collectives": seconds(two, "reduce"),
        "efficiency": one / measured,
        "against two unrelated": at_once / measured,
        "predicted": predicted["step_seconds"],
        "parts": predicted["seconds"],
        "rates": rates,
    }
    print(json.dumps(figures, indent=1))
    assert predicted["parameters"] > 40e6
    assert predicted["step_seconds"] == pytest.approx(measured, rel=0.1)
    assert (
        at_once / measured >= 0.85
    )  # what the ranks' exchange leaves; `efficiency` has in it what the cores take from each other


def planned(*overrides: str, ranks: int = 1, memory: float = 1e12, device: str = "cuda", config=CANVAS):
    return plan_run(
        load_config(config, ["evaluate.enabled=false", "prepare.batch=1", *overrides]), ranks, memory, device=device
    )


def test_parts_equal_counted_bytes():
    found = planned("engine.stage=2", "train.batch=12", "mask.keep=0.5", "train.background_save=true", ranks=2)
    total, trained = found["parameters"], found["trainable"]
    shard = trained // 2
    expected = {"weights": 4 * total, "master": 4 * shard, "saliency": 4 * shard, "mask": shard, "moments": 8 * shard}
    expected |= {"teacher": 4 * trained, "start": 4 * shard, "checkpoint copy": 17 * shard}
    assert {name: found["bytes"][name] for name in expected} == expected
    assert found["payload"] == {"gradients": 4 * trained, "weights": 4 * trained}
    assert planned("engine.stage=0", ranks=2)["bytes"]["master"] == 0
    assert planned("engine.moments=open", "mask.keep=0.25", ranks=2)["bytes"]["moments"] == 2 * shard


def test_a_net_in_stage_3_is_spread_and_its_gathered_copy_is_counted():
    found, alone = (
        planned("engine.stage=3", ranks=2, device="cpu"),
        planned("engine.stage=3", "train.batch=6", device="cpu"),
    )
    assert found["bytes"]["weights"] == pytest.approx(alone["bytes"]["weights"] / 2, rel=1e-3)
    gathered = 4 * (found["parameters"] + found["trainable"])  # what trains is gathered again, and then there twice
    assert found["bytes"]["buffers"] - alone["bytes"]["buffers"] == gathered


@pytest.mark.parametrize("name", ["dm_cal", "kscu", "esd", "concept_ablation", "salun", "rgd", "surgun"])
def test_every_method_can_be_rehearsed(name):
    found = planned(
        "model.arch=sana", "train.batch=2", config=PROJECT / "configs" / "canvas" / f"{name}.yaml", device="cpu"
    )
    assert found["bytes"]["activations"] + found["bytes"]["gradients"] > 0 and found["flops_per_step"] > 0
    assert ("assumed" in found) == (name in ("kscu", "esd"))


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "sana"])
def test_the_rehearsal_counts_the_bytes_that_a_real_step_keeps_alive(arch):
    """The same method on the same net, once without values and once with them."""
    config = load_config(CANVAS, [f"model.arch={arch}", "train.batch=2", "method.distill_weight=0"])
    rehearsed = Subject(config, 1).training[0]
    group = SimpleNamespace(device=torch.device("cpu"), size=1, rank=0, on_first=lambda work: work())
    backbone, method = backbone_of(config, group), method_of(config)
    opened = set(method.trainable(backbone.groups()))
    for parameter_name, parameter in backbone.net.named_parameters():
        parameter.requires_grad_(parameter_name in opened)
    prompts = concept_prompts(config.concepts[-1], config.prepare)
    streams = {}
    texts = {"target": prompts.target, "superclass": prompts.superclass}
    for role, other in (("target", "superclass"), ("superclass", "target")):
        chosen, others = (tuple(texts[name][i % len(texts[name])] for i in range(2)) for name in (role, other))
        latents = torch.randn(2, *backbone.latent_shape)
        streams[role] = Stream(latents, backbone.embed(chosen), chosen, (0, 1), (0, 1), backbone.embed(others))
    batch = ConceptBatch(streams)
    predictor = Predictor(backbone, backbone.net)
    step = Step(
        predictor,
        Predictor(backbone, backbone.net, torch.no_grad),
        None,
        batch,
        backbone,
        Draws(0, 0, 0, range(2), group.device),
        None,
        0,
        0.0,
    )
    real = rehearse(lambda: method.losses(step), backbone.net)
    assert real.forward == pytest.approx(rehearsed.forward, rel=0.02)
    assert max(m.bytes for m in real.backward) == pytest.approx(max(m.bytes for m in rehearsed.backward), rel=0.02)
    assert (real.forward_flops, real.backward_flops) == (rehearsed.forward_flops, rehearsed.backward_flops)
    assert (
        sum(m.arrived for m in real.backward)
        == sum(m.arrived for m in rehearsed.backward)
        == sum(backbone.net.get_parameter(n).numel() for n in opened)
    )


def test_a_change_that_makes_it_fit_does():
    room = planned(device="cpu")["peak"]
    for share in (0.7, 0.4):
        found = planned(device="cpu", memory=share * room)
        assert not found["fits"] and found["change"]["peak"] <= share * room
        again = planned(
            *found["change"]["overrides"], ranks=found["change"]["ranks"], device="cpu", memory=share * room
        )
        assert again["fits"] and max(again["peak"], again["drawing"]) == found["change"]["peak"]


def test_a_run_that_no_change_makes_fit_has_no_change():
    found = planned("train.batch=2", memory=1e3)
    assert found["fits"] is False and found["change"] is None


def test_a_cheap_change_is_preferred_to_an_expensive_one():
    subject = [
        "engine.stage=2",
        "model.path=" + str(PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"),
        "mask.keep=0.1",
        "train.batch=2",
    ]
    all_moments, open_moments = planned(*subject), planned(*subject, "engine.moments=open")
    between = (all_moments["peak"] + open_moments["peak"]) / 2
    assert planned(*subject, memory=between)["change"]["overrides"] == ["engine.moments=open"]


def test_more_ranks_take_less_memory_and_more_traffic():
    rates = Rates(1e10, {"sum": 1e9, "gather": 1e9, "scatter": 1e9}, 1e-4)
    table = plan_run(load_config(CANVAS, ["engine.stage=2"]), 1, 1e12, rates)["table"]
    assert [row["ranks"] for row in table] == [2**i for i in range(11)]
    assert all(a["peak"] >= b["peak"] for a, b in itertools.pairwise(table)) and table[0]["peak"] > table[-1]["peak"]
    assert all(
        a["step_seconds"] < b["step_seconds"] and a["samples_per_second"] < b["samples_per_second"]
        for a, b in itertools.pairwise(table)
    )
    found = table[1]
    moved = (2 * found["payload"]["gradients"] + found["payload"]["weights"]) / 2
    assert found["seconds"]["communication"] == pytest.approx(moved / 1e9 + found["collectives"] * 1e-4)


MISTAKES = {
    "no ranks": ({"ranks": 0}, "ranks=0: must be at least 1"),
    "a batch that does not divide": ({"ranks": 5}, "train.batch=12 is not divisible by ranks 5"),
    "no memory": ({"memory": 0.0}, "--memory 0: must be more than 0"),
    "a closed form": ({"config": PROJECT / "configs" / "canvas" / "uce.yaml"}, "is a closed form"),
    "a guard": (
        {"config": PROJECT / "configs" / "canvas" / "sld.yaml"},
        "method.name=sld: is a closed form or a guard",
    ),
    "an unknown device": ({"device": "tpu"}, "--device tpu: choose cpu or cuda"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    options, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        planned(**options)


def test_rates_come_from_the_command_or_from_a_bench(tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(
        "what a library printed\n"
        '{"sum_gb_per_second": 2.0, "latency_us": 125.0, "flops_per_second": 5e9, "weights": 3}\n'
    )
    assert read_rates([file], None, None, None) == Rates(5e9, {"sum": 2e9, "gather": 1e10, "scatter": 1e10}, 125 * 1e-6)
    assert read_rates([file], 1e12, 4.0, 10.0) == Rates(
        1e12, dict.fromkeys(("sum", "gather", "scatter"), 4e9), 10 * 1e-6
    )
    assert read_rates([], None, None, None) is None
    with pytest.raises(ConfigError, match="is not the JSON of a bench"):
        read_rates([PROJECT / "README.md"], None, None, None)
    with pytest.raises(ConfigError, match="flops_per_second=0: a rate must be more than 0"):
        read_rates([], 0.0, None, None)


def test_the_command_prints_the_change_that_fits(tmp_path):
    rates = tmp_path / "rates.json"
    rates.write_text(
        'noise\n{"sum_gb_per_second": 1.0, "gather_gb_per_second": 1.0, "scatter_gb_per_second": 1.0, '
        '"latency_us": 100.0}\n'
    )
    printed = sculpt(
        "plan",
        str(CANVAS),
        "--ranks",
        "2",
        "--memory",
        "0.025",
        "--device",
        "cpu",
        "--flops",
        "1e10",
        "--rates",
        str(rates),
    )
    assert "samples/s" in printed and "1,024" in printed and "does not fit into 0.025 GB; with " in printed
    found = json.loads(sculpt("plan", str(CANVAS), "--ranks", "2", "--json").splitlines()[-1])
    assert found["fits"] is True and found["change"] is None and "step_seconds" not in found
    assert "model.path=nowhere: there is no such folder" in sculpt("plan", str(CANVAS), "model.path=nowhere", code=2)
