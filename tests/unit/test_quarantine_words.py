"""What `facemllm import` says of the rows that it refused."""

from facemllm.cli.data import _table
from facemllm.tables import FACES, TableWriter


def test_the_three_commonest_reasons_are_said_with_their_counts(tmp_path):
    out = tmp_path / "faces"
    with TableWriter(out, FACES) as writer:
        for row, reason in enumerate("abbcccd"):
            writer.quarantine("labels.csv", row, reason)
    facts, words = _table(writer.manifest, out)
    assert facts["quarantined"] == 7
    assert words.splitlines()[1:] == ["  3: c", "  2: b", "  1: a"]
