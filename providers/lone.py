"""Which session runs a request that is alone: all threads or one, learned while such requests run.

Does: one choice per size of inputs, and what all of them together say of the session with all threads.
Leaves out: the sessions (providers.wide), which runs were disturbed (providers.runner), what the load tried
(providers.prove).

Rules
 * The first guess is all threads, since the load drops a session that is plainly not worth it; later it is what was
   found out last.
 * Now and then a request tries the other session. It is compared with the runs just before it and with nothing older,
   so what else the machine does weighs on both sides alike, and runs need not be told apart by how quiet it was.
 * One trial proves nothing: the sessions change places when WINS trials in a row were clearly quicker. After one that
   was, the next follows soon; after one that was not, they are so rare that they show neither in the 99th percentile
   of the requests nor much in their mean.
 * A trial that was disturbed, or that came to nothing, is not made up for at once: else a session in which requests
   fail would be tried by every one of them.
 * Sizes within a factor of two share a choice, and their times are brought to the same size: a model of sentences has
   more arrangements than anybody could learn about one by one.
 * The first run of a session on a size allocates, and counts for nothing.
 * All threads are given up for good if they were never worth it, however often they were tried: their session's memory
   is then of more use elsewhere.
"""

from __future__ import annotations

import collections

#: Runs that a trial is compared with: the median of so few forgets a disturbance at once, and none of two decides it.
RECENT = 5
#: A trial has to take less than this share of their time: less is noise.
CLEAR = 0.95
#: Trials in a row that have to be clearly quicker. Of two sessions that differ by nothing but noise, few would change.
WINS = 3
#: Runs before the first trial and after a promising one: as many as make all that the next is compared with new.
SOON = RECENT
#: Runs after one that was not: fewer than one request in a hundred pays for what is learned.
SELDOM = 128
#: A trial may cost its request so much once in SELDOM runs; one that costs more is made the more seldom.
DEAR_NS = 200_000_000
#: Of such rare trials, so many without all threads having been seen to pay: some ten thousand requests. A machine that
#: had no cores to spare for that long has a use for the memory.
IN_VAIN = 80


class Lone:
    """What is known of one worker's two sessions.

    Attributes:
        begins_wide: what the next size begins with: what was found out last for another.
        given_up: the session with all threads is not needed any more.
    """

    __slots__ = ("_choices", "_has_paid", "_in_vain", "begins_wide", "given_up")

    def __init__(self) -> None:
        self._choices: dict[int, Choice] = {}
        self._has_paid = False
        self._in_vain = 0
        self.begins_wide = True
        self.given_up = False

    def choice(self, size_bytes: int) -> Choice:
        """For requests whose inputs have so many bytes."""
        bits = size_bytes.bit_length()
        choice = self._choices.get(bits)
        if choice is None:
            choice = self._choices[bits] = Choice(self, 1 << bits)
        return choice

    def judged(self, *, pays: bool, rare: bool) -> None:
        """After a trial, rare or not, whether all threads have been clearly quicker WINS times in a row."""
        if pays:
            self._has_paid = True
        elif rare and not self._has_paid:
            self._in_vain += 1
            self.given_up = self._in_vain >= IN_VAIN


class Choice:
    """For requests of one size, at most `most_bytes`. They are alone, so no two of them run at the same time.

    Attributes:
        wide: all threads are quicker, as far as is known.
    """

    __slots__ = (
        "_interval",
        "_lone",
        "_most_bytes",
        "_new",
        "_recent",
        "_runs",
        "_wide_wins",
        "_wins",
        "wide",
    )

    def __init__(self, lone: Lone, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self.wide = lone.begins_wide
        self._lone = lone
        self._new = {False, True}  # sessions that have not run yet
        self._recent: collections.deque[int] = collections.deque(maxlen=RECENT)  # ns, of the session in use
        self._runs = 0  # of it, since the last trial
        self._interval = SOON  # after so many the other is tried
        self._wins = 0  # trials in a row in which the other was clearly quicker
        self._wide_wins = 0  # the same of all threads, whichever is in use

    def next_is_wide(self) -> bool:
        """Which session runs the next request."""
        return self.wide is not self._is_due()

    def observe(self, ns: int, size_bytes: int, *, wide: bool) -> None:
        """A run on so many bytes, that nothing else of this worker disturbed, took `ns`."""
        ns = ns * self._most_bytes // max(1, size_bytes)
        if wide in self._new:
            self._new.remove(wide)
        elif wide is self.wide:
            self._recent.append(ns)
            self._runs += 1
        elif self._is_due():
            self._judge(ns)

    def spoilt(self, ns: int, size_bytes: int, *, wide: bool) -> None:
        """A run was disturbed, stopped after `ns`, or failed."""
        if wide is not self.wide:
            self._runs = self._wins = 0
            self._interval = SELDOM
        elif self._recent:
            # One that is always stopped would never be compared. It had taken as long as that at least.
            usual = sorted(self._recent)[len(self._recent) // 2]
            self.observe(max(ns, usual * size_bytes // self._most_bytes), size_bytes, wide=wide)
        else:
            self.observe(ns, size_bytes, wide=wide)

    def _is_due(self) -> bool:
        return self._runs >= self._interval

    def _judge(self, ns: int) -> None:
        """A trial of the other session took `ns`."""
        usual = sorted(self._recent)[len(self._recent) // 2]
        is_quicker, is_slower = ns < CLEAR * usual, usual < CLEAR * ns
        is_rare = self._interval >= SELDOM
        self._wins = self._wins + 1 if is_quicker else 0
        self._wide_wins = self._wide_wins + 1 if (is_slower if self.wide else is_quicker) else 0
        self._lone.judged(pays=self._wide_wins >= WINS, rare=is_rare)
        self._runs = 0
        self._interval = SOON if is_quicker else max(SELDOM, SELDOM * (ns - usual) // DEAR_NS)
        if self._wins == WINS:
            self._change()

    def _change(self) -> None:
        self._lone.begins_wide = self.wide = not self.wide
        self._recent.clear()
        self._wins = 0
        self._interval = SELDOM
