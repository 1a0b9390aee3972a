"""Whether guessing pays, and which way of it: found out by trials that may lose a small share of all time.

The unit is a step without guesses. A step with guesses costs as many of these as it took as long, the making
of the guesses and all looking for them included, and is worth as many as would have written its tokens. A way
to guess is tried for some steps; it is used if it was worth more than it cost, until it no longer is, which a
cumulative sum notices (Page 1954, https://doi.org/10.1093/biomet/41.1-2.100). A way that lost is tried again
after a pause that doubles each time, since texts change.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

#: Steps without guesses, of which the median says what one takes; so many are seen before any has guesses.
WINDOW, LEAST_SEEN = 9, 4
#: Steps of a trial, if it doesn't fail before: those with guesses, those without, where none were found, and
#: those in which the guesser read what it must know first.
TRIAL, IN_VAIN, READINGS = 24, 64, 32
#: While a way is used, after so many steps there are some without guesses: the first time, since what was
#: known of these when it won may have been chance, and at most. The first of these isn't counted: what it
#: needs has been driven from the caches.
FIRST_PLAIN, PLAIN_EVERY, PLAIN_RUN = 16, 128, 5
#: By how much these must differ from those before for being believed more than them.
DRIFT = 1.25
#: Steps until a way that lost is tried again: the first time, and at most.
PAUSE, LONGEST_PAUSE = 64, 4096
#: What ways that lost may have lost before another is tried, as a share of all that was spent.
SHARE = 0.02
#: How much has to be lost for the conviction that a way doesn't pay.
STAKE = 3.0
#: What one step can prove: it may have been slow for other reasons.
PROOF = 1.0
#: How many times what its steps usually cost one of a trial may have cost; more is something else's doing.
MOST_TIMES = 4.0
#: How much better than what is used a way has to be.
BETTER = 1.02
#: How fast the rate of the way that is used follows its last steps.
FADING = 1 / 64


@dataclass
class _Way:
    """The step from which on a way may be tried again, and the pause if it loses then."""

    due: int = 0
    pause: int = PAUSE


class Switch:
    """Chooses between no guesses and some ways to make them.

    Parameters
    ----------
    ways : int

    Attributes
    ----------
    trying : bool
        Whether there is a trial.
    begins : bool
        Whether none of its steps has been counted.
    """

    def __init__(self, ways: int) -> None:
        self._ways = [_Way() for _ in range(ways)]
        self._plain: dict[int, deque[float]] = {}
        self._used: int | None = None  # the way that pays
        self._chosen: int | None = None  # that of the next step: the one that pays, one on trial, or none
        self._steps = self._steps_since_plain = 0
        self._plain_every = FIRST_PLAIN
        self._run = 0  # of how many steps without guesses this is the end
        self._fresh: dict[int, list[float]] = {}  # the seconds of these, but the first
        self._drifts: list[float] = []  # how many times what was expected of them
        self._spent = self._lost = 0.0
        self._next_trial = 0.0
        self._worth = self._cost = 1.0  # of what is used, of its last steps most
        self._before: int | None = None  # the way that paid before a better one was found
        self._judge_anew(trying=False)

    def _judge_anew(self, trying: bool) -> None:
        self.trying = self.begins = trying
        self._since, self._readings, self._in_vain, self._judged = self._steps, 0, 0, 0
        self._balance = self._read = 0.0
        self._worths: list[float] = []  # of the trial's steps
        self._costs: list[float] = []

    def way(self, sequences: int) -> int | None:
        """The way to guess in the next step, which writes so many sequences; None for none."""
        if self._chosen is None:
            return None
        return self._chosen if len(self._plain.get(sequences, ())) >= LEAST_SEEN else None

    def plain_seconds(self, sequences: int) -> float:
        """What a step without guesses takes, of which one was seen."""
        return max(median(self._plain[sequences]), 1e-9)

    def plain(self, sequences: int, seconds: float) -> None:
        """A step took so long for which nobody was asked for guesses."""
        self._steps += 1
        self._spent += 1
        self._run += 1
        if self._run > 1:
            self._see(sequences, seconds)
        if self._run == PLAIN_RUN:
            self._plain_every = min(2 * self._plain_every, PLAIN_EVERY)
            self._follow_drift()
        if self._run >= PLAIN_RUN and not self.trying:
            self._steps_since_plain = 0
            self._chosen = self._used
            if self._steps >= self._next_trial:
                self._try_another()

    def _see(self, sequences: int, seconds: float) -> None:
        """A step without guesses counts."""
        seen = self._plain.setdefault(sequences, deque(maxlen=WINDOW))
        if self._run <= PLAIN_RUN:
            fresh = self._fresh.setdefault(sequences, [])
            if len(seen) > len(fresh):
                expected = median(list(seen)[: len(seen) - len(fresh)])
                self._drifts.append(seconds / max(expected, 1e-9))
            fresh.append(seconds)
        seen.append(seconds)

    def _follow_drift(self) -> None:
        """Where steps without guesses take clearly longer or shorter than before, all of before do."""
        drift = median(self._drifts) if self._drifts else 1.0
        if 1 / DRIFT <= drift <= DRIFT:
            return
        for sequences, seen in self._plain.items():
            fresh = self._fresh.get(sequences, [])
            before = list(seen)[: len(seen) - len(fresh)]
            self._plain[sequences] = deque([*(drift * one for one in before), *fresh], WINDOW)

    def guessed(self, sequences: int, guesses: int, written: int, seconds: float, ready: bool = True) -> None:
        """A step of the way that was chosen took so long, with all that it needed.

        Parameters
        ----------
        sequences, guesses, written : int
            Those that wrote, tokens guessed for them, which may be none, and tokens that they wrote.
        seconds : float
        ready : bool
            False where the guesser read what it needn't read again.
        """
        cost, worth = seconds / self.plain_seconds(sequences), written / sequences
        self._steps += 1
        self._steps_since_plain += 1
        self._run, self._fresh, self._drifts = 0, {}, []
        self._spent += cost
        if not self.trying:
            self._judge_use(worth, cost)
            return
        self.begins = False
        if not ready and self._readings < READINGS:
            self._readings += 1
            self._read += max(0.0, self._rate * cost - worth)
        else:
            self._judged += guesses > 0
            self._in_vain += guesses == 0
            self._judge_trial(worth, cost)

    @property
    def _rate(self) -> float:
        """Worth over cost of what is used."""
        return self._worth / self._cost if self._used is not None else 1.0

    def _judge_trial(self, worth: float, cost: float) -> None:
        self._balance += max(worth - self._rate * cost, -PROOF)
        self._worths.append(worth)
        self._costs.append(cost)
        lost = self._balance < -STAKE
        if not lost and self._judged < TRIAL and self._in_vain < IN_VAIN:
            return
        assert self._chosen is not None
        usual = median(self._costs)
        costs = self._rate * sum(min(cost, MOST_TIMES * usual) for cost in self._costs)
        if lost or sum(self._worths) <= BETTER * costs:
            self._drop(self._chosen, self._read + max(0.0, costs - sum(self._worths)))
        else:
            self._use(self._chosen)

    def _judge_use(self, worth: float, cost: float) -> None:
        self._balance = min(self._balance + max(worth - cost, -PROOF), STAKE / 2)
        self._worth += worth - FADING * self._worth
        self._cost += cost - FADING * self._cost
        if self._balance < -STAKE:
            self._give_up()
        elif self._steps_since_plain >= self._plain_every:
            self._chosen = None
        elif self._steps >= self._next_trial:
            self._try_another()

    def _use(self, way: int) -> None:
        """The way on trial won."""
        if self._used is not None:
            self._ways[self._used].due = self._steps + PAUSE
        self._before, self._used = self._used, way
        self._steps_since_plain, self._plain_every = 0, FIRST_PLAIN
        self._worth, self._cost = sum(self._worths), sum(self._costs)
        self._judge_anew(trying=False)
        self._plan()

    def _give_up(self) -> None:
        """What is used doesn't pay any more; what was used before it may."""
        way = self._used
        assert way is not None
        if self._steps - self._since > self._ways[way].pause:
            self._ways[way].pause = PAUSE  # it did pay, for a while
        self._used, self._before = self._before, None
        self._worth = self._cost = 1.0
        self._drop(way, STAKE * 1.5)

    def _drop(self, way: int, lost: float) -> None:
        """A way lost so much."""
        self._lost += lost
        self._rest(way)
        self._chosen = self._used
        self._judge_anew(trying=False)
        self._plan()

    def _rest(self, way: int) -> None:
        one = self._ways[way]
        one.due = self._steps + one.pause
        one.pause = min(2 * one.pause, LONGEST_PAUSE)

    def _others(self) -> list[int]:
        return [way for way in range(len(self._ways)) if way != self._used]

    def _plan(self) -> None:
        """Say from which step on another way may be tried."""
        due = min((self._ways[way].due for way in self._others()), default=float("inf"))
        self._next_trial = max(due, self._steps + self._lost / SHARE - self._spent)

    def _try_another(self) -> None:
        """Begin the trial that is due first, if losses allow it."""
        self._plan()
        if self._steps < self._next_trial:
            return
        self._chosen = min(self._others(), key=lambda way: self._ways[way].due)
        self._judge_anew(trying=True)
