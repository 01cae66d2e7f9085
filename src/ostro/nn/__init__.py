"""Small modules that know the axis names of their parameters; models are built from these.

Every module keeps float32 master weights. Layers compute in the dtype of their input and cast their
weight to it. Norms take the float32 sum that runs through the blocks and give what layers compute
in. Statistics of norms, of the softmax and of the loss are float32.
"""

from ostro.nn.activation import ACTIVATIONS
from ostro.nn.attention import CausalAttention, KeyValueCache
from ostro.nn.embedding import Embedding, TiedGradient
from ostro.nn.init import axes_of, initialize
from ostro.nn.linear import Linear
from ostro.nn.loss import IGNORE, linear_cross_entropy, token_losses
from ostro.nn.norm import LayerNorm, RMSNorm
from ostro.nn.rotary import RotaryConfig, turn_fused
