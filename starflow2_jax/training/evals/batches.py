"""Batches of held-out documents for evaluations."""

from collections.abc import Callable, Iterator, Sequence

from jax.sharding import Mesh

from starflow2_jax import sequence
from starflow2_jax.data.groups import GroupedBatches
from starflow2_jax.data.mixture import Stream
from starflow2_jax.parallel import processes, sharding


class HeldOutBatches:
    """The first documents of held-out sources, as global arrays on the mesh; the same every time.

    read: makes batches of streams. count: batches of all sources together, shared out by their weights; a source with
    fewer documents is read once.
    """

    def __init__(
        self, streams: Sequence[Stream], read: Callable[[list[Stream]], GroupedBatches], count: int, mesh: Mesh
    ):
        self.readers = {stream.name: read([stream]) for stream in streams}
        total = sum(stream.weight for stream in streams)
        self.counts = {stream.name: max(1, round(count * stream.weight / total)) for stream in streams}
        self.layout = sharding.batch_sharding(mesh)

    def __iter__(self) -> Iterator[sequence.Sequence]:
        """The batches of all sources. All processes iterate together."""
        return (batch for source in self.readers for batch in self.of(source))

    def of(self, source: str) -> Iterator[sequence.Sequence]:
        """The batches of one source. The last one may have empty rows."""
        reader = self.readers[source]
        reader.restart()
        for _ in range(self.counts[source]):
            rows = next(reader)
            if all(processes.gather(reader.ended)):
                return
            yield reader.place(rows, self.layout)
