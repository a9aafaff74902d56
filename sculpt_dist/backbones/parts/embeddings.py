"""Prompt embeddings: computed once per prompt, kept in memory, and stored in a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from sculpt_dist.core.errors import NonFiniteError
from sculpt_dist.core.files import write_atomically
from sculpt_dist.core.tensorfile import raw_bytes
from sculpt_dist.core.types import TextCond


class PromptEmbeddings:
    """The text encoders' outputs by prompt. A prompt to guide away from (`negative`) has an embedding of its own."""

    def __init__(
        self,
        encode: Callable[[Sequence[str], bool], TextCond],
        with_size_ids: Callable[[TextCond], TextCond],
        device: torch.device,
        batch: int = 16,
    ) -> None:
        """`encode` maps (prompts, negative) to [B, ...], with B up to `batch`.

        `with_size_ids` adds what the file does not store. Embeddings are given out on `device`, and kept in the host's
        memory.
        """
        self._encode, self._with_size_ids, self.device, self.batch = encode, with_size_ids, device, batch
        self._known: dict[tuple[str, bool], TextCond] = {}

    @property
    def num_bytes(self) -> int:
        """The host's memory that the known embeddings take."""
        tensors = (tensor for cond in self._known.values() for tensor in vars(cond).values())
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def embed(self, prompts: Sequence[str], negative: bool) -> TextCond:
        """Embeddings of the prompts, [B, ...]; each distinct prompt passes the text encoders once.

        Raises NonFiniteError where a text encoder overflows.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if (prompt, negative) not in self._known]
        for first in range(0, len(missing), self.batch):
            batch = missing[first : first + self.batch]
            with torch.no_grad():
                cond = self._encode(batch, negative)
            self._check_finite(batch, cond)
            self._remember(batch, cond, negative)
        cond = TextCond.cat([self._known[prompt, negative] for prompt in prompts])
        return cond.map(self._to_device) if self.device.type == "cuda" else cond

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """Forget at the end what is embedded within: the many prompts of a list would fill the memory."""
        before = dict(self._known)
        try:
            yield
        finally:
            self._known = before

    def write(self, file: Path, key: str, prompts: Sequence[str], negatives: Sequence[str]) -> None:
        """Store the embeddings of these prompts and negative prompts; `key` names what they belong to."""
        from safetensors.torch import save

        cond = TextCond.cat([self.embed(prompts, negative=False), self.embed(negatives, negative=True)])
        stored = {
            f.name: getattr(cond, f.name) for f in fields(cond) if f.name != "size_ids"
        }  # they follow the options
        tensors = {name: tensor.contiguous().cpu() for name, tensor in stored.items() if tensor is not None}
        about = {"key": key, "prompts": json.dumps([list(prompts), list(negatives)]), "sha256": _digest(tensors)}
        write_atomically(file, save(tensors, about))

    def read(self, file: Path, key: str) -> bool:
        """Take the embeddings from such a file; False when there is none with this key, or it is damaged."""
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            return False
        try:
            with safe_open(file, "pt") as content:
                about = content.metadata() or {}
                if about.get("key") != key:
                    return False
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not iterable)
        except SafetensorError:
            return False
        if about.get("sha256", _digest(tensors)) != _digest(tensors):  # earlier versions did not write it
            return False
        prompts, negatives = json.loads(about["prompts"])
        cond = self._with_size_ids(TextCond(**tensors))
        self._remember(prompts, cond, negative=False)
        self._remember(negatives, cond[len(prompts) :], negative=True)
        return True

    def _check_finite(self, prompts: Sequence[str], cond: TextCond) -> None:
        for values in (cond.tokens, cond.pooled):
            finite = None if values is None or self.device.type == "meta" else values.flatten(1).isfinite().all(1)
            if finite is not None and not bool(finite.all()):
                prompt = prompts[int((~finite).nonzero()[0, 0])]
                raise NonFiniteError(
                    f"the text encoder gives values that are not finite for the prompt {prompt!r}, in "
                    f"{cond.tokens.dtype}: set model.text_dtype=bfloat16 or float32"
                )

    def _remember(self, prompts: Sequence[str], cond: TextCond, negative: bool) -> None:
        kept = cond.map(Tensor.cpu) if self.device.type == "cuda" else cond
        self._known |= {(prompt, negative): kept[i : i + 1] for i, prompt in enumerate(prompts)}

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)


def is_embeddings_intact(file: Path) -> bool | None:
    """Whether a file of embeddings is as it was written; None where an earlier version wrote it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            expected = (content.metadata() or {}).get("sha256")
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not iterable)
    except (SafetensorError, OSError):
        return False
    return None if expected is None else expected == _digest(tensors)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
