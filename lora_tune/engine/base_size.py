"""Bytes that a loaded base takes: what is on the device for as long as a study runs."""

from collections.abc import Iterator

from torch import Tensor, nn


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, with what bitsandbytes keeps beside a 4-bit weight.

    That is the scales of its blocks, quantized once more, and their tables. A storage that is shared, as tied
    embeddings are, counts once.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in _tensors(model)}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter
        yield from _of_state(getattr(parameter, "quant_state", None))
    yield from model.buffers()


def _of_state(state: object) -> Iterator[Tensor]:
    """Yield the tensors of a quantization state, which may hold a second one: that of its scales."""
    if state is None:
        return
    for value in vars(state).values():
        if isinstance(value, Tensor):
            yield value
    yield from _of_state(getattr(state, "state2", None))
