"""The page of shared memory on which a worker notes what it does with the connections it was lent.

Does: name the cells. The worker writes them, a store each; the daemon reads them when somebody asks, and when the
worker has died: then they tell which client's request died with it.
Leaves out: the memory itself (providers.area), lending (providers.lending), serving (providers.loans).
"""

from __future__ import annotations

from providers.histogram import BUCKETS

#: Connections lent to one worker at a time; half of the descriptors it may have.
MAX_LOANS = 128

# States of a slot, in the two lowest bits of its cell; above them, requests are counted.
IDLE = 0  # every request that was read has been answered
READING = 1  # part of a request may have been read
TAKEN = 2  # exactly one request was read
SENDING = 3  # its answer may be on its way
STATES = 3
TURN = 4

#: When the run under way began, nanoseconds of the monotonic clock; 0: none.
STARTED = 0
#: Requests answered, and the nanoseconds that these and their runs took in all.
COUNT = 1
REQUEST_NS = 2
RUN_NS = 3
#: Rows of those requests.
ROWS = 4
FIRST_SLOT = 5
FIRST_BUCKET = FIRST_SLOT + MAX_LOANS
CELLS = FIRST_BUCKET + BUCKETS
BYTES = 8 * CELLS
