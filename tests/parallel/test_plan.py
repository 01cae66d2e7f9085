"""Where parameters lie: precedence of settings, placements, and what is refused."""

import pytest

from ostro.cli.main import run_command
from ostro.core.axes import MeshSizes, map_axes
from ostro.core.axes import ParameterAxes as Axes
from ostro.core.errors import ConfigError
from ostro.parallel.plan import plan_sharding
from ostro.trainer import TrainerConfig

BASIC = {"batch_axis": "batch", "fsdp_axis": "embed", "tensor_parallel_axes": None}
PARAMETERS = {
    "table": ((61, 16), Axes(("embed",), ("vocab",), lookup=True)),
    "qkv": ((48, 16), Axes(("heads",), ("embed",), num_heads=4)),
    "qkv.bias": ((48,), Axes(("heads",), num_heads=4)),
    "up": ((64, 16), Axes(("mlp",), ("embed",))),
    "down": ((16, 64), Axes(("embed",), ("mlp",))),
    "norm": ((16,), Axes(("embed",))),
}


def plan(sizes, parameters=PARAMETERS, **settings):
    return plan_sharding(parameters, map_axes(**(BASIC | settings)), sizes)


def test_the_documented_mappings():
    default = map_axes(**BASIC)
    assert default.compute == {"batch": ("replica", "data")}
    assert default.parameter == {"batch": ("replica", "data"), "embed": ("data",)}
    split = map_axes(**(BASIC | {"tensor_parallel_axes": ["mlp", "heads"]}))
    both = {"mlp": ("model",), "heads": ("model",), "batch": ("replica", "data")}
    assert split.compute == both and split.parameter == both | {"embed": ("data",)}
    assert map_axes(**(BASIC | {"fsdp_axis": None})).parameter == {"batch": ("replica", "data")}
    two = map_axes(**(BASIC | {"fsdp_axis": ["embed", "mlp"]}))
    assert two.fsdp == ("embed", "mlp") and two.parameter["mlp"] == ("data",)


def test_a_basic_setting_wins_and_says_so():
    mapping = map_axes(
        **(BASIC | {"tensor_parallel_axes": "mlp"}),
        axis_resources={"mlp": "data"},
        parameter_axis_resources={"embed": "model"},
    )
    assert mapping.compute["mlp"] == ("model",) and mapping.parameter["embed"] == ("data",)
    assert len(mapping.warnings) == 2 and "tensor_parallel_axes wins" in mapping.warnings[0]
    late = map_axes(**BASIC, compute_axis_resources={"batch": ["data"], "vocab": "model"})
    assert late.compute == {"batch": ("data",), "vocab": ("model",)} and not late.warnings
    advanced = map_axes(**(BASIC | {"fsdp_axis": None}), parameter_axis_resources={"mlp": "data"})
    assert advanced.fsdp == ("mlp",) and "mlp" not in advanced.compute


def test_every_dim_of_a_2_by_2_mesh():
    plans = plan(MeshSizes(data=2, model=2), tensor_parallel_axes=["mlp", "heads", "vocab"])
    assert {name: dict(p.dims) for name, p in plans.items()} == {
        "table": {"model": 0, "data": 1},
        "qkv": {"model": 0, "data": 1},
        "qkv.bias": {"model": 0, "data": 0},
        "up": {"model": 0, "data": 1},
        "down": {"model": 1, "data": 0},
        "norm": {"data": 0},
    }
    assert plans["table"].local_shape == (31, 8), "a vocabulary may come out uneven"
    assert plans["qkv.bias"].local_shape == (12,) and plans["norm"].local_shape == (8,)


def test_context_shards_with_data_and_replica_copies():
    plans = plan(MeshSizes(replica=2, data=2, context=2))
    assert plans["down"].local_shape == (4, 64)
    for copied in (plan(MeshSizes(replica=4)), plan(MeshSizes(data=4), fsdp_axis=None)):
        assert not any(each.dims for each in copied.values())


@pytest.mark.parametrize(
    ("sizes", "settings", "said"),
    [
        ({"model": 3}, {"tensor_parallel_axes": "heads"}, "= 3 .* 4 heads of parameter qkv"),
        ({"model": 5}, {"tensor_parallel_axes": "mlp"}, "= 5 .* axis mlp of parameter up, .* 64"),
        ({"data": 3}, {}, "= embed .* parameter table has size 16, .* 3 devices"),
        ({"model": 40}, {"tensor_parallel_axes": "vocab"}, "leaves a device without"),
    ],
)
def test_what_cannot_be_divided_is_refused(sizes, settings, said):
    with pytest.raises(ConfigError, match=said) as refused:
        plan(MeshSizes(**sizes), **settings)
    assert len(refused.value.problems) == 1, "one for each setting and axis"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_parallel_axes": "embed", "model_axis_size": 2}, "residual stream"),
        ({"axis_resources": {"mlp": "modle"}}, "no mesh axis"),
        ({"axis_resources": {"position": "model"}}, "context_axis_size"),
        ({"compute_axis_resources": {"batch": "data"}}, "replica and data"),
        ({"deepspeed": {}, "model_axis_size": 2}, "DeepSpeed"),
        ({"context_axis_size": 0}, "at least 1"),
    ],
)
def test_mappings_that_no_model_can_follow(settings, said):
    found = list(TrainerConfig(**settings).problems())
    assert any(said in f"{p.rule} {p.advice}" for p in found)
    assert any(p.setting.partition(".")[0] in settings for p in found), "a setting that was given"


def test_devices_that_do_not_come_out_even():
    with pytest.raises(ConfigError, match=r"model_axis_size \* context_axis_size"):
        TrainerConfig(model_axis_size=2, context_axis_size=2).mesh_sizes(6)
    sizes = TrainerConfig(model_axis_size=2, replica_axis_size=2).mesh_sizes(16)
    assert str(sizes) == "2 replica x 4 data x 1 context x 2 model"


def test_plan_sharding_as_typed(capsys):
    words = ["plan", "sharding", "--config_path", "config/gpt2_small.yaml", "--devices", "8"]
    words += ["--trainer.model_axis_size", "2", "--trainer.tensor_parallel_axes", "[mlp,heads]"]
    assert run_command(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mesh of 8 devices: 1 replica x 4 data x 1 context x 2 model"
    (row,) = [line for line in lines if line.startswith("blocks.11.mlp.down.weight ")]
    assert row.split()[1:] == [
        *("embed", "768", "x", "mlp", "3072", "mlp", "(dim", "1)", "embed", "(dim", "0)"),
        str(768 * 3072 * 4 // 8),
    ]
    assert run_command([*words[:5], "12", *words[6:7], "7"]) == 2
    assert "must divide the number of devices = 12" in capsys.readouterr().err
