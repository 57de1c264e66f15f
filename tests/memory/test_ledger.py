"""The ledger's rules, each on a few blocks: booked while referred to, gradients added as autograd does."""

from lora_tune.memory.ledger import LOGITS, Book, Gradient, RecordingBook


def test_a_block_is_booked_while_somebody_refers_to_it() -> None:
    book = Book()
    first = book.hold(1000)
    also = first
    assert book.now == 1024  # rounded up to 512
    del first
    assert book.now == 1024
    del also
    assert book.now == 0
    assert book.peak == 1024


def test_the_peak_knows_its_phase_and_kinds() -> None:
    book = Book()
    book.phase = "forward"
    kept = book.hold(2048)
    book.phase = "loss"
    book.touch(4096, LOGITS)
    book.phase = "backward"
    del kept
    assert (book.peak, book.peak_phase) == (6144, "loss")
    assert book.peak_kinds == [2048, 4096, 0]


def test_nodes_run_backwards_and_only_where_a_gradient_arrives() -> None:
    book, ran = Book(), []
    first = book.node(lambda gradient: ran.append("first"))

    def middle(gradient: Gradient) -> None:
        ran.append("middle")
        book.accumulate(first, gradient.pop())

    reached = book.node(middle)
    book.node(lambda gradient: ran.append("never"))
    book.accumulate(reached, book.hold(512))
    book.run_backward()
    assert ran == ["middle", "first"]
    assert not book.tape


def test_a_gradient_is_added_in_place_unless_somebody_else_refers_to_it() -> None:
    book = Book()
    node = book.node(lambda gradient: None)
    book.accumulate(node, book.hold(512))
    book.accumulate(node, book.hold(512))
    assert (book.now, book.peak) == (512, 1024)
    shared = book.hold(512)
    other = book.node(lambda gradient: None)
    book.accumulate(other, shared)
    book.accumulate(other, book.hold(512))  # into a new one: the shared one stays as it is
    assert book.now == 3 * 512
    assert book.peak == 4 * 512


def test_after_the_stop_of_a_recomputation_nothing_is_booked() -> None:
    book = Book()
    book.stopped = True
    late = book.hold(4096)
    book.touch(4096)
    assert (book.now, book.peak, late.size) == (0, 0, 0)


def test_a_recording_book_tells_every_booking_in_order() -> None:
    book = RecordingBook()
    first = book.hold(600)
    book.touch(100)
    second = book.hold(512, count=3)
    del first
    assert book.events == [
        (True, 1, 1024),
        (True, 2, 100),
        (False, 2, 0),
        (True, 3, 1536),
        (False, 1, 0),
    ]
    del second
    assert book.now == 0
