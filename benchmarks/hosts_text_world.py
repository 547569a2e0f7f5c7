"""The small world that the language hosts read and are asked about: events, told in English.

An event has an agent, a predicate and an object, and may have a place and a day. Each predicate
takes objects of one type, and cue words stand before most names, so that who reads enough learns
the types of a name: half of the names have two, and what happens decides. Downstream, training sees
some of the names and few cue words, and its test other names.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field


def _words(text: str) -> list[str]:
    return text.split()


PEOPLE = _words("Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Luca")
LAST = _words("Adler Brandt Costa Duran Ekman Fuchs Garcia Holm Ivanov Jansen Keller Lindt")
CITIES = _words("Aarhus Bergen Cadiz Dover Essen Geneva Izmir Jena Krakow Lisbon Malmo Naples")
FIRMS = _words("Acron Belmex Cortix Daviton Elbex Ferrum Gantos Intor Jupex Koralis Rotex Wexon")
WORKS = _words(
    "Ballad Daybreak Echoes Fandango Jubilee Lullaby Mirage Nocturne Rhapsody Serenade Tempest "
    "Whispers"
)
# a person or a city; a firm or a work
PERSON_OR_CITY = _words(
    "Austin Charlotte Chelsea Florence Jackson Lincoln Madison Orlando Sydney Verona Victoria "
    "Vienna"
)
FIRM_OR_WORK = _words(
    "Aurora Gravity Horizon Kingdom Lumina Odyssey Orbis Polaris Quantum Solaris Utopia Zenith"
)


def _in_turn(own: Sequence[str], shared: Sequence[str]) -> tuple[str, ...]:
    """One's own names and those shared with another type, which have the same places there."""
    return tuple(name for both in zip(own, shared, strict=True) for name in both)


NAMES = {
    "PER": _in_turn(PEOPLE, PERSON_OR_CITY),
    "LOC": _in_turn(CITIES, PERSON_OR_CITY),
    "ORG": _in_turn(FIRMS, FIRM_OR_WORK),
    "MISC": _in_turn(WORKS, FIRM_OR_WORK),
}
SURNAMES = {"PER": LAST, "ORG": ["Bank", "Group", "Works"], "LOC": ["Bay", "Hill", "Harbour"]}
CUES = {
    "PER": ["Mr", "Doctor", "Captain", "Uncle"],
    "LOC": ["the city of", "the village of", "the port of"],
    "ORG": ["the company", "the club", "the firm"],
    "MISC": ["the film", "the song", "the novel"],
}
THINGS = _words("boat bridge piano statue lamp wagon clock fence tower engine")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
# by the type of their object; "" is a thing
PREDICATES = {
    "": ["painted", "repaired", "carried", "sold", "cleaned", "ordered"],
    "PER": ["helped", "praised", "hired", "invited"],
    "LOC": ["visited", "mapped", "crossed", "described"],
    "ORG": ["joined", "founded", "advised", "sued"],
    "MISC": ["reviewed", "recorded", "translated", "performed"],
}
KINDS = {predicate: kind for kind, some in PREDICATES.items() for predicate in some}
# of names: what training, validation and test of a downstream task may use
SPLITS = {"train": (0, 3), "validation": (1, 6), "test": (2, 4, 5, 7, 8)}
# shares of names: with a cue in what is read, with one in the tasks, with a second word
CUED, TASK_CUED, SURNAMED = 0.7, 0.3, 0.35


@dataclass(frozen=True)
class Phrase:
    """Some words, of which those from `start` on name something of a type; "" for a thing."""

    words: tuple[str, ...]
    kind: str
    start: int = 0

    @property
    def name(self) -> str:
        """The words that name it, as an answer."""
        return " ".join(self.words[self.start :])


@dataclass(frozen=True)
class Event:
    """Who did what to whom, where and when; a place or day may be missing."""

    agent: Phrase
    predicate: str
    patient: Phrase
    place: Phrase | None = None
    day: str = ""


@dataclass
class Sentence:
    """Words, with what they name and which role they play.

    Attributes:
        words: the sentence, punctuation being words of their own.
        entities: IOB2 tags of types, one a word.
        frames: by the place of a predicate in `words`, IOB2 tags of roles, one a word.
    """

    words: list[str] = field(default_factory=list)
    entities: list[str] = field(default_factory=list)
    frames: dict[int, list[str]] = field(default_factory=dict)
    _spans: list[tuple[int, int, int, str]] = field(default_factory=list)
    _verbs: dict[int, int] = field(default_factory=dict)

    def say(self, *words: str) -> None:
        """Words that name nothing."""
        self.words += words
        self.entities += ["O"] * len(words)

    def name(self, phrase: Phrase) -> None:
        """A phrase, its name tagged."""
        self.say(*phrase.words[: phrase.start])
        named = phrase.words[phrase.start :]
        self.words += named
        for index in range(len(named)):
            tag = "B" if index == 0 else "I"
            self.entities.append(f"{tag}-{phrase.kind}" if phrase.kind else "O")

    def role(self, frames: Sequence[int], role: str, start: int) -> None:
        """All from `start` on plays a role in some frames; "V" is a frame's predicate itself."""
        for frame in frames:
            self._spans.append((frame, start, len(self.words), role))
            if role == "V":
                self._verbs[frame] = start

    def close(self) -> "Sentence":
        """End it with a full stop, and fill `frames`."""
        self.say(".")
        for frame, verb in self._verbs.items():
            tags = ["O"] * len(self.words)
            for owner, start, end, role in self._spans:
                if owner == frame:
                    tags[start:end] = [f"B-{role}", *[f"I-{role}"] * (end - start - 1)]
            self.frames[verb] = tags
        return self


class World:
    """Draws phrases, events and sentences; what it draws follows from `rng` alone."""

    def __init__(self, rng: random.Random, split: str = "", cued: float = CUED) -> None:
        """Draw from a split's names, "" from all, a share of them with a cue."""
        self.rng, self.cued = rng, cued
        turns = SPLITS[split] if split else range(9)
        self.names = {
            kind: [name for i, name in enumerate(names) if i % 9 in turns]
            for kind, names in NAMES.items()
        }

    def phrase(self, kind: str) -> Phrase:
        """A name of a type, with a cue before most; or a thing."""
        rng = self.rng
        if not kind:
            return Phrase(("the", rng.choice(THINGS)), "")
        cue = rng.choice(CUES[kind]).split() if rng.random() < self.cued else []
        words = [rng.choice(self.names[kind])]
        if kind in SURNAMES and rng.random() < SURNAMED:
            words.append(rng.choice(SURNAMES[kind]))
        return Phrase((*cue, *words), kind, len(cue))

    def event(self, predicate: str = "") -> Event:
        """An event, of a predicate or of any."""
        rng = self.rng
        predicate = predicate or rng.choice(PREDICATES[rng.choice([*PREDICATES])])
        agent = self.phrase("ORG" if rng.random() < 0.25 else "PER")
        patient = self.phrase(KINDS[predicate])
        while patient.name == agent.name:
            patient = self.phrase(KINDS[predicate])
        place = self.phrase("LOC") if rng.random() < 0.6 else None
        return Event(agent, predicate, patient, place, rng.choice(("", *DAYS)))

    def sentence(self, *events: Event) -> Sentence:
        """One event in the active or passive, with the place first or last; or two of an agent."""
        rng, said = self.rng, Sentence()
        first = events[0]
        frames = range(len(events))
        ahead = first.place is not None and rng.random() < 0.3
        if ahead:
            self._place(said, first, frames)
            said.say(",")
        if len(events) == 1 and rng.random() < 0.4:
            self._passive(said, first)
        else:
            self._agent(said, first, frames)
            if len(events) == 2 and rng.random() < 0.5:
                said.say(",", "who")
                self._done(said, events[1], 1)
                said.say(",")
                self._done(said, first, 0)
            else:
                for index, event in enumerate(events):
                    if index:
                        said.say("and")
                    self._done(said, event, index)
        if not ahead and first.place is not None:
            self._place(said, first, frames[-1:] if len(events) == 2 else frames)
        if first.day:
            start = len(said.words)
            said.say("on", first.day)
            said.role(frames[-1:] if len(events) == 2 else frames, "AM-TMP", start)
        return said.close()

    def _place(self, said: Sentence, event: Event, frames: Sequence[int]) -> None:
        assert event.place is not None
        start = len(said.words)
        said.say(self.rng.choice(("in", "near")))
        said.name(event.place)
        said.role(frames, "AM-LOC", start)

    def _agent(self, said: Sentence, event: Event, frames: Sequence[int]) -> None:
        start = len(said.words)
        said.name(event.agent)
        said.role(frames, "A0", start)

    def _done(self, said: Sentence, event: Event, frame: int) -> None:
        for role, add in (("V", None), ("A1", event.patient)):
            start = len(said.words)
            if add is None:
                said.say(event.predicate)
            else:
                said.name(add)
            said.role((frame,), role, start)

    def _passive(self, said: Sentence, event: Event) -> None:
        start = len(said.words)
        said.name(event.patient)
        said.role((0,), "A1", start)
        said.say("was")
        start = len(said.words)
        said.say(event.predicate)
        said.role((0,), "V", start)
        start = len(said.words)
        said.say("by")
        said.name(event.agent)
        said.role((0,), "A0", start)


ASKED = ("agent", "patient", "place", "day")


def question(event: Event, asked: str) -> tuple[str, str]:
    """A question on one of `ASKED` of an event, and its answer; "" where nothing is told."""
    agent, patient = (" ".join(phrase.words) for phrase in (event.agent, event.patient))
    if asked == "agent":
        return f"who {event.predicate} {patient} ?", event.agent.name
    if asked == "patient":
        word = "who" if event.patient.kind == "PER" else "what"
        return f"{word} was {event.predicate} by {agent} ?", event.patient.name
    word, answer = ("when", event.day) if asked == "day" else ("where", "")
    if asked == "place" and event.place is not None:
        answer = event.place.name
    return f"{word} was {patient} {event.predicate} ?", answer
