"""A whole step of a decoder in one call to the C kernels, over the parameters that a Transformer has packed.

It gives the bits of `Transformer.forward` with the compiled operators; why it exists is written at the top of
model/native/decoder.h. It owns the room that a step works in and does not know sampling. Shape letters as in
model/transformer.py.
"""

from __future__ import annotations

import ctypes
from array import array

import torch
from torch import Tensor

from model.attention.base import Layout
from model.inputs import SlotTables
from model.interface import Batch
from model.kv_cache import KVCache
from model.linear_native import Matrix, NativeLinear
from model.native.library import Kernels
from model.transformer import Logits, Transformer

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class _Layer(ctypes.Structure):
    """The C struct `Layer` of decoder.h, field by field."""

    _fields_ = (
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _POINTER) for name in ("norm1", "norm2", "k_cache", "v_cache")),
    )


class _Room(ctypes.Structure):
    """The C struct `Room` of decoder.h, field by field."""

    _fields_ = tuple((name, _POINTER) for name in ("normed", "codes", "code_scales"))


class _Decoder(ctypes.Structure):
    """The C struct `Decoder` of decoder.h, field by field."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("unembedding", Matrix),
        *((name, _POINTER) for name in ("embedding", "norm", "cosines", "sines")),
        *((name, _POINTER) for name in ("x", "qkv", "mixed", "q", "activated", "tiles")),
        *((name, _POINTER) for name in ("ids", "positions", "write_blocks", "write_offsets", "wanted")),
        *((name, _POINTER) for name in ("query_starts", "context_lens", "slots")),
        ("rooms", ctypes.POINTER(_Room)),
        *((name, _INT) for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")),
        *((name, _INT) for name in ("block_size", "is_bf16")),
        *((name, _FLOAT) for name in ("epsilon", "scale")),
    )


class _Step(ctypes.Structure):
    """The C struct `Step` of decoder.h, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "tokens", "block_tables")),
        *((name, ctypes.c_int64) for name in ("token_stride", "table_stride")),
        *((name, _INT) for name in ("num_rows", "num_tokens", "num_wanted")),
        *((name, _POINTER) for name in ("logits", "peaks", "places")),
    )


class NativeDecoder:
    """A transformer whose linears, operators and attention are the compiled ones, and its cache."""

    def __init__(
        self, kernels: Kernels, transformer: Transformer, cache: KVCache, max_tokens: int, max_rows: int
    ) -> None:
        """Takes steps of so many tokens and rows at most, on as many threads as torch has now, or fewer."""
        assert cache.layout is Layout.DOTS
        self._transformer, self._cache = transformer, cache  # the structs point into them
        config = transformer.config
        self._max_tokens, self._max_rows = max_tokens, max_rows
        self._dtype = transformer.embedding_VE.dtype
        most = min(max_tokens, max_rows)
        self._logits = torch.empty(most, config.vocab_size)
        self._first_logits: dict[int, Tensor] = {}  # of so many rows: a view costs as much as all the rest
        self._peaks, self._peak_ids = array("f", [0.0] * most), array("q", [0] * most)
        peaks = (column.buffer_info()[0] for column in (self._peaks, self._peak_ids))
        self._logit_addresses = [self._logits.data_ptr(), *peaks]
        q_size = config.num_heads * config.head_dim
        qkv_size = q_size + 2 * config.num_kv_heads * config.head_dim
        widths = (config.hidden_size, qkv_size, q_size, q_size, config.intermediate_size)
        self._between = [torch.empty(max_tokens, width, dtype=self._dtype) for width in widths]
        self._between += [torch.empty(2, max_tokens, dtype=torch.int32)]
        self._between += [torch.empty(max_tokens, dtype=torch.int64) for _ in range(5)]
        self._between += [torch.empty(max_rows + 1, dtype=torch.int32) for _ in range(3)]
        self._max_threads, few_rows = torch.get_num_threads(), kernels.library.quire_few_rows()
        self._prepared = [self._room(max_tokens), *(self._room(few_rows) for _ in range(self._max_threads))]
        rooms = [_Room(*(tensor.data_ptr() for tensor in room)) for room in self._prepared]
        self._layers = (_Layer * config.num_layers)(*map(self._layer, range(config.num_layers)))
        rotary = transformer.rotary
        parameters = (transformer.embedding_VE, transformer.norm_E, rotary.cos_PD, rotary.signed_sin_PD)
        self._decoder = _Decoder(
            self._layers,
            _struct(transformer.unembedding),
            *(tensor.data_ptr() for tensor in (*parameters, *self._between)),
            (_Room * len(rooms))(*rooms),
            *(config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            *(cache.block_size, self._dtype is torch.bfloat16),
            *(config.norm_epsilon, config.head_dim**-0.5),
        )
        self._step = kernels.library.quire_step
        self._step.argtypes = (ctypes.POINTER(_Decoder), ctypes.POINTER(_Step), _INT)
        self._step.restype = None

    def forward(self, tables: SlotTables, batch: Batch) -> Logits:
        """Computes a batch; the next one overwrites the logits. See model.backend.Forward."""
        rows = batch.rows
        columns = array("i", [x for row in rows for x in (row.slot, row.start, row.num_tokens, row.wants_token)])
        num_wanted = sum(columns[3::4])
        num_threads = torch.get_num_threads()
        assert 0 < batch.num_tokens <= self._max_tokens and len(rows) <= self._max_rows
        assert num_threads <= self._max_threads, "each thread has a room of its own"
        step = _Step(
            *(columns.buffer_info()[0], *tables.addresses),
            *(tables.tokens.shape[1], tables.block_tables.shape[1]),
            *(len(rows), batch.num_tokens, num_wanted),
            *self._logit_addresses,
        )
        self._step(self._decoder, step, num_threads)
        if (values_WV := self._first_logits.get(num_wanted)) is None:
            values_WV = self._first_logits[num_wanted] = self._logits[:num_wanted]
        return Logits(values_WV, self._peaks[:num_wanted].tolist(), self._peak_ids[:num_wanted].tolist())

    def _room(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where rows lie that are about to meet a matrix: as they are, or as codes of 8 bits and their scales."""
        config = self._transformer.config
        widest = max(config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
        normed = torch.empty(num_rows, config.hidden_size, dtype=self._dtype)
        return normed, torch.empty(num_rows, widest + 3, dtype=torch.uint8), torch.empty(num_rows)

    def _layer(self, index: int) -> _Layer:
        layer = self._transformer.layers[index]
        matrices = map(_struct, (layer.qkv, layer.o, layer.gate_up, layer.down))
        tensors = (layer.norm1_E, layer.norm2_E, self._cache.k[index], self._cache.v[index])
        return _Layer(*matrices, *(tensor.data_ptr() for tensor in tensors))


def _struct(linear: object) -> Matrix:
    assert isinstance(linear, NativeLinear)
    return linear.struct
