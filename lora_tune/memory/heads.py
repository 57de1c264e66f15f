"""From the last layer's output to the gradient that goes back into it: norm, head, loss, by stack.

Notation as in ``ops.py``; V vocabulary, N positions with a label, C positions in a chunk.
"""

from collections.abc import Callable, Mapping

from lora_tune.memory.ledger import LOGITS, Block, Value
from lora_tune.memory.ops import Ops
from lora_tune.memory.shape import ModelShape

TRL_CHUNK_TOKENS, TRL_CHUNK_VOCABULARY = 4096, 32768
"""TRL 1.16: ``kernels/chunked_logprob.py`` TOKEN_CHUNK_SIZE, ``trainer/utils.py``."""

Head = Callable[[Ops, ModelShape, list[Value]], None]


def full_logits(ops: Ops, shape: ModelShape, hidden: list[Value]) -> None:
    """``ForCausalLMLoss`` on the logits of all positions.

    Forward ends at 10 V: 16-bit logits, float32 logits, their log-softmax. Backward: log-softmax, its
    gradient through nll_loss and through itself, 12 V; 2 V more while the caller holds the outputs.
    """
    book, n = ops.book, ops.n
    tokens, vocab = n.tokens, shape.vocab_size
    normed = ops.norm(hidden.pop(), shape.hidden)
    ops.embeddings.clear()
    e = 2 if n.autocast else normed.e
    head = [book.hold(2 * vocab * shape.hidden)] if n.autocast and n.weight_e == 4 else []
    narrow = [] if normed.e == e else [book.hold(e * tokens * shape.hidden)]
    logits = [book.hold(e * tokens * vocab, LOGITS)]
    narrow.clear()
    capped: list[Block] = []
    if shape.final_softcap:  # divided, through tanh, which is kept, and multiplied
        logits = [book.hold(e * tokens * vocab, LOGITS)]
        capped = [book.hold(e * tokens * vocab, LOGITS)]
        logits = [book.hold(e * tokens * vocab, LOGITS)]
    wide = logits.copy() if e == 4 else [book.hold(4 * tokens * vocab, LOGITS)]
    log_softmax = book.hold(4 * tokens * vocab, LOGITS)
    wide.clear()
    if not n.outputs_held:
        logits.clear()
    source, own = normed.node, normed.e
    assert source is not None
    del normed
    ops.end_autocast()
    book.phase = "loss"
    by_nll = book.hold(4 * tokens * vocab, LOGITS)
    grad = book.hold(4 * tokens * vocab, LOGITS)
    del by_nll, log_softmax
    if e != 4:
        grad = book.hold(e * tokens * vocab, LOGITS)
    for _ in range(3 if capped else 0):
        grad = book.hold(e * tokens * vocab, LOGITS)
    capped.clear()
    grad = book.hold(e * tokens * shape.hidden)
    head.clear()
    if own != e:
        grad = book.hold(own * tokens * shape.hidden)
    book.accumulate(source, grad)
    ops.held += logits  # of a caller who keeps them, or nothing


def label_chunks(ops: Ops, shape: ModelShape, hidden: list[Value]) -> None:
    """Our loss on the label positions, C at a time (``engine/loss.py``).

    A chunk's float32 logits become their own gradient (4 V), which is cast to a 16-bit compute type
    (e V) and multiplied with the head (e h). The hidden states of the positions (e h N) live until
    backward ends, their gradient (e h N) until it is used.
    """
    book, n = ops.book, ops.n
    e, h, vocab = n.compute_e, shape.hidden, shape.vocab_size
    labels = n.label_tokens
    normed = ops.norm(hidden.pop(), h)
    ops.embeddings.clear()
    source = normed.node
    assert source is not None
    ops.held.append(book.hold(e * h * labels, LOGITS))
    del normed
    book.phase = "loss"
    losses = book.hold(4 * labels, LOGITS)
    grad = book.hold(e * h * labels, LOGITS)
    chunk = min(n.chunk_tokens, labels)
    logits = book.hold(4 * chunk * vocab, LOGITS)
    if e < 4:
        narrow = book.hold(e * chunk * vocab, LOGITS)
        book.touch(e * chunk * h, LOGITS)
        del narrow
    else:
        book.touch(e * chunk * h, LOGITS)
    del logits
    grad = book.hold(e * h * labels, LOGITS)  # times the gradient of the sum
    back = book.hold(e * h * n.tokens)
    del grad
    book.accumulate(source, back)
    del back, losses


def trl_chunks(ops: Ops, shape: ModelShape, hidden: list[Value]) -> None:
    """TRL's ``ChunkedLogProbFunction`` on the label positions.

    A tile of at most 4096 positions by 32768 words in the compute type, in forward and again in
    backward; the positions' hidden states (e h N) and their float32 gradient (4 h N).
    """
    book, n = ops.book, ops.n
    h, labels, tile_e = shape.hidden, n.label_tokens, 2 if n.autocast else n.compute_e
    normed = ops.norm(hidden.pop(), h)
    ops.embeddings.clear()
    source, e = normed.node, normed.e
    assert source is not None
    picked = book.hold(e * h * labels, LOGITS)
    book.phase = "loss"
    chunk = min(TRL_CHUNK_TOKENS, labels)
    tile_bytes = tile_e * chunk * TRL_CHUNK_VOCABULARY
    chunk_bytes = 0 if e == tile_e else tile_e * chunk * h
    running = [book.hold(4 * labels, LOGITS) for _ in range(7)]
    tile = book.hold(tile_bytes, LOGITS)
    book.touch(chunk_bytes, LOGITS)
    del tile, normed
    running.clear()
    ops.end_autocast()
    wide = book.hold(4 * h * labels, LOGITS)
    tile = book.hold(tile_bytes, LOGITS)
    book.touch(chunk_bytes, LOGITS)
    grad = wide if e == 4 else book.hold(e * h * labels, LOGITS)
    del tile, wide, picked
    back = book.hold(e * h * n.tokens)
    del grad
    back = book.hold(e * h * n.tokens)  # of the slice without the last position
    book.accumulate(source, back)


HEADS: Mapping[str, Head] = {
    "trainer": full_logits,
    "trainer-kbit": full_logits,
    "trl": trl_chunks,
    "lora-tune": label_chunks,
}
