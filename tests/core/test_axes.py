"""Axis names of parameters: their order, and which of them are matrices."""

from ostro.core.axes import EMBED, HEADS, MLP, VOCAB, ParameterAxes


def test_a_weight_lists_its_outputs_first():
    weight = ParameterAxes((HEADS, "head_size"), (EMBED,))
    assert weight.names == ("heads", "head_size", "embed")
    assert weight.is_matrix


def test_a_table_is_indexed_by_its_input_and_is_no_matrix():
    table = ParameterAxes((EMBED,), (VOCAB,), lookup=True)
    assert table.names == ("vocab", "embed")
    assert not table.is_matrix


def test_a_bias_has_no_inputs_and_is_no_matrix():
    bias = ParameterAxes((MLP,))
    assert bias.names == ("mlp",)
    assert not bias.is_matrix
