"""Logical axis names: what the dims of parameters and activations are called.

An *axis* is a name ("embed"); a *dim* is a position in a tensor. A parameter of a layer is
described by the axes it reads (`ins`) and the axes it writes (`outs`): a linear layer from the
residual stream to the MLP reads `embed` and writes `mlp`. Everything that treats parameters by
their role (weight decay, sharding, counting) asks these names, never a parameter's position in
a module tree.
"""

from dataclasses import dataclass

POSITION = "position"
EMBED = "embed"
HEADS = "heads"
MLP = "mlp"
VOCAB = "vocab"


@dataclass(frozen=True)
class ParameterAxes:
    """The logical axes of one parameter, in the order of its dims: outputs, then inputs."""

    outs: tuple[str, ...]
    """Axes of the leading dims: what the parameter produces. `outs[i]` names dim i."""
    ins: tuple[str, ...] = ()
    """Axes of the trailing dims: what it is multiplied with or looked up by. Empty for a bias."""
    lookup: bool = False
    """True for a table indexed by token or position (its dims are then `ins` before `outs`)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Axis name of each dim of the tensor, in order."""
        return self.ins + self.outs if self.lookup else self.outs + self.ins

    @property
    def is_matrix(self) -> bool:
        """True for a weight that multiplies activations: the parameters that decay by default."""
        return bool(self.ins) and not self.lookup
