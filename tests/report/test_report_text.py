from __future__ import annotations

import json
import math
import unicodedata

from comptrust.sweep.report_text import embed, visible
from hypothesis import given
from hypothesis import strategies as st

anything = st.text(st.characters(exclude_categories=()))  # surrogates too: a tokenizer can decode to them
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | anything,
    lambda inner: st.lists(inner) | st.dictionaries(anything, inner),
    max_leaves=8,
)


@given(anything)
def test_visible_leaves_nothing_that_changes_how_its_neighbours_read(text):
    shown = visible(text)
    shown.encode("utf-8")
    for c in shown:
        assert c in "\n\t" or unicodedata.category(c) != "Cc"
        # the oracle is Unicode's own class of each character, not our list
        assert (
            unicodedata.bidirectional(c) not in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"}
            or c in "\u200c\u200d"
        )


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("éß中文हिन्दी👩🏽‍🔬\n\t")))
def test_visible_keeps_ordinary_text(text):
    assert visible(text) == text


def test_visible_names_the_character():
    assert visible("a\u202eb\u2066c\u200bd\x00e\u2028f") == "a⟦U+202E⟧b⟦U+2066⟧c⟦U+200B⟧d⟦U+0000⟧e⟦U+2028⟧f"


@given(values)
def test_embedded_json_cannot_leave_its_script_element(value):
    text = embed(value)
    assert not set(text) & set("<>&\u2028\u2029")
    json.loads(text)


@given(st.lists(st.floats() | st.text(st.characters(min_codepoint=32, max_codepoint=126))))
def test_embedded_json_keeps_its_values(values):
    expected = [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]
    assert json.loads(embed(values)) == expected
