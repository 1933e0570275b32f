"""The encoder-decoder of recurrent networks, without attention and with it.

`RNNConfig.attention` says how the decoder reads the encoder's states h_1 … h_S, its memory:

| part      | context c_t                    | query   | enters            | source                |
|-----------|--------------------------------|---------|-------------------|-----------------------|
| LastState | the last state h_S at every t  |         | cell, with y_t−1  | Sutskever, Cho 2014   |
| MeanState | the mean of all, at every t    |         | cell, with y_t−1  |                       |
| Bahdanau  | attention to all states        | s_{t−1} | cell, with y_t−1  | Bahdanau et al. 2015  |
| Luong     | attention to all, or a window  | s_t     | output            | Luong et al. 2015     |

All predict the next token from h̃_t = tanh(W_c [c_t; s_t]), so they differ in the context alone and
share the names and, but for the width of the first cell's input, the shapes of their parameters.
"""

from attention.models.rnn.config import RNNConfig
from attention.models.rnn.decoder import RNNDecoder
from attention.models.rnn.encoder import RNNEncoder
from attention.models.rnn.encoder_decoder import RNNEncoderDecoder
from attention.models.rnn.reading import Bahdanau, LastState, LocalM, LocalP, Luong, MeanState

__all__ = [
    "Bahdanau",
    "LastState",
    "LocalM",
    "LocalP",
    "Luong",
    "MeanState",
    "RNNConfig",
    "RNNDecoder",
    "RNNEncoder",
    "RNNEncoderDecoder",
]
