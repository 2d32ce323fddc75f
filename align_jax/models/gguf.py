"""Models in GGUF files (llama.cpp's format): metadata, tensors, and their Hugging Face names.

The header is read here rather than by `gguf.GGUFReader`, which takes two seconds for SmolLM2's
vocabulary and does not notice a truncated file; the `gguf` package dequantises.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import dataclasses
import math
import mmap
import pathlib
import struct
from typing import Any

import numpy as np

from align_jax.errors import ModelError
from align_jax.files import irregular
from align_jax.text import brief

# Value types of the format -> struct codes; 8 is a string and 9 an array.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# Hugging Face's Llama names <- GGUF's.
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    offset: int
    size_bytes: int


class GGUFFile:
    """A GGUF file: `metadata` as Python values, and float32 tensors by their Hugging Face names.

    Raises:
      ModelError: no GGUF file, a truncated one, an architecture other than llama, or a tensor type
        that the `gguf` package cannot dequantise. Once this returns all tensors are there.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        if what := irregular(path):
            raise ModelError(f"{path} {what}; expected a GGUF file.")
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: it does not start with 'GGUF'.")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 4
        version, tensors, entries = self._take("<IQQ")
        if version not in (2, 3):
            raise ModelError(f"{path}: GGUF version {version} is not supported, only 2 and 3 are.")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            if key in self.metadata:
                raise self._damaged(f"{brief(key)} is there twice")
            try:
                self.metadata[key] = self._value(self._take("<I")[0])
            except RecursionError as error:
                raise self._damaged(f"arrays nested too deeply in {brief(key)}") from error
        infos = [self._tensor_info() for _ in range(tensors)]
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelError(
                f"{path}: GGUF architecture {architecture!r}; only 'llama' is supported."
            )
        self._tensors = self._locate(infos)

    def _take(self, form: str) -> tuple:
        try:
            size = struct.calcsize(form)
        except struct.error as error:
            raise self._damaged("an array longer than memory") from error
        self._need(size)
        values = struct.unpack_from(form, self._bytes, self._position)
        self._position += size
        return values

    def _need(self, size: int) -> None:
        if self._position + size > len(self._bytes):
            raise ModelError(
                f"{self.path} is truncated: its header exceeds its {len(self._bytes):,} bytes. "
                "Copy or download it again."
            )

    def _string(self) -> str:
        (size,) = self._take("<Q")
        self._need(size)
        text = self._bytes[self._position : self._position + size]
        self._position += size
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} has a damaged header ({what}). Copy or download it again.")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, length = self._take("<IQ")
            if kind in _SCALARS:
                return list(self._take(f"<{length}{_SCALARS[kind]}"))
            return [self._value(kind) for _ in range(length)]
        if kind not in _SCALARS:
            raise self._damaged(f"value type {kind}")
        (value,) = self._take("<" + _SCALARS[kind])
        # float32 1e-5 is meant, not its expansion 9.9999997e-06.
        return float(str(np.float32(value))) if _SCALARS[kind] == "f" else value

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (rank,) = self._take("<I")
        if not 1 <= rank <= 4:
            raise self._damaged(f"{name} has {rank} dimensions")
        shape = self._take(f"<{rank}Q")[::-1]
        kind, offset = self._take("<IQ")
        return name, shape, kind, offset

    def _locate(self, infos) -> dict[str, _Tensor]:
        import gguf

        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= len(self._bytes):
            raise self._damaged(f"general.alignment is {brief(alignment)}")
        start = -(-self._position // alignment) * alignment
        found = {}
        for name, shape, kind, offset in infos:
            try:
                kind = gguf.GGMLQuantizationType(kind)
                block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
                if kind not in {tensor.type for tensor in found.values()}:
                    gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            except (ValueError, NotImplementedError) as error:
                raise ModelError(f"{self.path}: tensor {name} cannot be read, {error}.") from error
            if name in found:
                raise self._damaged(f"tensor {name} is there twice")
            if shape[-1] % block:
                raise self._damaged(
                    f"tensor {name} has rows of {shape[-1]} values, which are no whole blocks of "
                    f"{block}"
                )
            size = math.prod(shape) // block * block_bytes
            if start + offset + size > len(self._bytes):
                raise ModelError(
                    f"{self.path} is truncated: it has {len(self._bytes):,} bytes, and tensor "
                    f"{name} ends at {start + offset + size:,}. Copy or download it again."
                )
            found[name] = _Tensor(shape, kind, start + offset, size)
        return found

    def hf_config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face `config.json` of model_type llama."""
        data = self.metadata
        get = lambda key, default=None: data.get(f"llama.{key}", default)  # noqa: E731
        if "rope_freqs.weight" in self._tensors or get("rope.scaling.type", "none") != "none":
            raise ModelError(f"{self.path}: RoPE scaling in GGUF files is not supported.")
        for key in ("expert_count", "attention.sliding_window"):
            if get(key):
                raise ModelError(f"{self.path}: llama.{key}={get(key)} is not supported.")
        tokens = data.get("tokenizer.ggml.tokens", [])
        if not isinstance(tokens, list):
            raise self._damaged(f"tokenizer.ggml.tokens is {brief(tokens)}, no array")
        return {
            "model_type": "llama",
            "vocab_size": get("vocab_size", len(tokens)),
            "hidden_size": get("embedding_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": get("attention.head_count"),
            "num_key_value_heads": get("attention.head_count_kv"),
            "head_dim": get("attention.key_length", get("rope.dimension_count")),
            "intermediate_size": get("feed_forward_length"),
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-5),
            "rope_theta": get("rope.freq_base", 10_000.0),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its Hugging Face name; a name without one stays as it is."""
        return {_hf_name(name): tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor by its Hugging Face name, dequantised to float32, in Hugging Face's layout."""
        import gguf

        tensor = self._tensors[_gguf_name(name)]
        raw = np.frombuffer(self._bytes, np.uint8, tensor.size_bytes, tensor.offset)
        # Flat: `dequantize` would walk a matrix sixteen rows at a time, three times slower.
        values = gguf.dequantize(raw, tensor.type).reshape(tensor.shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.metadata["llama.attention.head_count"]
            if name.endswith("k_proj.weight"):
                heads = self.metadata.get("llama.attention.head_count_kv", heads)
            values = _half_rotation(values, heads)
        return values


def _half_rotation(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows from GGUF's rotary pairs (0,1), (2,3), ... to halves (0,d/2), (1,d/2+1), ..."""
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.weight"


def _hf_name(name: str) -> str:
    for ours, theirs in _NAMES.items():
        if name == theirs:
            return ours
    match name.split("."):
        case ["blk", layer, part, "weight"]:
            for ours, theirs in _LAYER_NAMES.items():
                if part == theirs:
                    return f"model.layers.{layer}.{ours}.weight"
    return name
