"""What is held out of a text: how much, from where, and that nothing is lost or used twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.data.holdout import HOLDOUTS, hold_out

PARAGRAPHS = [f"Paragraph {i} of a text.\nIt has two lines." for i in range(4000)]
TEXT = "\n\n".join(PARAGRAPHS)


def test_the_end() -> None:
    (train,), (val,) = hold_out([TEXT])
    assert train + val == TEXT and val.startswith("Paragraph ")
    assert len(val) == pytest.approx(0.1 * len(TEXT), rel=0.01)
    documents = [TEXT[i : i + 1000] for i in range(0, len(TEXT), 1000)]
    train_documents, val_documents = hold_out(documents)
    assert "".join(train_documents + val_documents) == TEXT
    assert (
        train_documents[:-1] == documents[: len(train_documents) - 1]
        and val_documents[1:] == documents[-len(val_documents) + 1 :]
    )


def test_pieces_from_all_over() -> None:
    documents = [TEXT[:50_001], TEXT[50_001:50_002], "", TEXT[50_002:]]
    train, val = hold_out(documents, "spread")
    assert sum(map(len, val)) == pytest.approx(0.1 * len(TEXT), rel=0.05)
    assert "" in train and sorted("".join(train + val)) == sorted(TEXT)
    places = [TEXT.index(piece) / len(TEXT) for piece in val]
    assert len(places) == 8 and max(places) > 0.95 and min(places) < 0.15
    first = sorted(places[:4])
    assert (
        first[1] - first[0] > 0.1 and first[-1] - first[0] > 0.5
    )  # a validation that reads only these sees all of the text
    begins = sum(piece.startswith("Paragraph ") for piece in val)
    assert begins >= len(val) - 1  # but a piece that ends where its document does
    assert all(piece not in text for piece in val for text in train)


@settings(max_examples=40)
@given(st.lists(st.text("ab \n", max_size=60), max_size=8), st.sampled_from(HOLDOUTS), st.randoms())
def test_nothing_is_lost(documents: list[str], holdout: str, rng: random.Random) -> None:
    documents = [text * rng.choice((1, 1, 500)) for text in documents]
    try:
        train, val = hold_out(documents, holdout)
    except ValueError as e:
        assert "too few" in str(e) and sum(map(len, documents)) < 20
        return
    assert sorted("".join(train + val)) == sorted("".join(documents))
    assert 0 < sum(map(len, val)) <= 0.1 * sum(map(len, documents)) + 1
    if holdout == "end":
        assert "".join(train + val) == "".join(documents)
