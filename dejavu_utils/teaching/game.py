"""A guessing game: from a background crop, the reader, the target and the reference say what was
cut away.
"""

from dataclasses import dataclass, field

import pandas as pd

from dejavu_utils.attack import references
from dejavu_utils.models.pairs import Pair

PLAYERS = ("you", "target", "reference")


@dataclass
class Game:
    """Rounds to be guessed one after the other, and the guesses so far."""

    rounds: list[dict]  # as `start` makes them
    classes: tuple[str, ...]
    guesses: list[str] = field(default_factory=list)

    @property
    def row(self) -> dict | None:
        """Return the round that is not guessed yet, or None after the last."""
        return self.rounds[len(self.guesses)] if len(self.guesses) < len(self.rounds) else None

    def guess(self, name: str) -> dict:
        """Return the round that was played, after taking `name` as the reader's guess."""
        if name not in self.classes:
            raise ValueError(f"game: no class {name!r}; guess one of {', '.join(self.classes)}.")
        if self.row is None:
            raise ValueError(
                f"game: all {len(self.rounds)} rounds are played; run the cell again for a new "
                "game."
            )
        self.guesses.append(name)
        return self.rounds[len(self.guesses) - 1]

    def score(self) -> dict[str, int]:
        """Return how many of the rounds played so far each of PLAYERS got right."""
        played = [
            row["said"] | {"you": name, "truth": row["name"]}
            for row, name in zip(self.rounds, self.guesses, strict=False)
        ]
        return {player: sum(one[player] == one["truth"] for one in played) for player in PLAYERS}

    def auto(self) -> dict[str, int]:
        """Return how many of all rounds target and reference get right: no guess of a reader is
        needed.
        """
        return {
            player: sum(row["said"][player] == row["name"] for row in self.rounds)
            for player in PLAYERS[1:]
        }


def start(pair: Pair, table: pd.DataFrame, ids: list[str]) -> Game:
    """Return a new game with a round per id; of more than 20 classes only those of the rounds are
    on offer.

    A round is the row of `references.neighbours` with `said`, what target and reference infer:
    `table` is the label inference (`references.two_model`) of one epoch, whose vote of k neighbours
    decides.
    """
    own = table[table["layer"] == "projector"].set_index(["id", "role"])["prediction"]
    classes, epoch = pair.parts["public"].classes, int(table["epoch"].iloc[0])
    rows = references.neighbours(pair, epoch, ids) if ids else []
    rounds = [
        row | {"said": {role: classes[own[name, role]] for role in PLAYERS[1:]}}
        for name, row in zip(ids, rows, strict=True)
    ]
    return Game(
        rounds, classes if len(classes) <= 20 else tuple(sorted({row["name"] for row in rounds}))
    )


def history(pair: Pair, epochs: list[int], ids: list[str]) -> dict[str, list[dict]]:
    """Return {id: rows of `plots.gallery`, one an epoch}: what both models find nearest as training
    goes on.
    """
    found = [references.neighbours(pair, epoch, ids) for epoch in epochs] if ids else []
    return {
        name: [
            rows[i] | {"title": f"epoch {epoch}"} for epoch, rows in zip(epochs, found, strict=True)
        ]
        for i, name in enumerate(ids)
    }
