import pytest
from guess_env import CharTokenizer

from at2po_agent.transcripts import InlineTranscript, Transcript


@pytest.mark.parametrize("closed", [False, True])
def test_inline_pieces_are_the_texts_themselves(closed):
    transcript = InlineTranscript(CharTokenizer())
    assert isinstance(transcript, Transcript)
    assert transcript.open("ab\n") == [97, 98, 10]
    assert transcript.observe(" c ", closed=closed) == [32, 99, 32]
