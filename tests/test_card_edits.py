"""A card that somebody edited by hand: rendered again, what is ours is renewed and what is theirs stays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lingudistill.hub.edits import OWN_TEXT, UnreadableCard, is_ours, merged, sealed

Edit = Callable[[str], str]


def card(number: int, *, limits: bool = True, tags: str = "[one, two]") -> str:
    """What a template would render: `number` stands for everything that a new evaluation changes."""
    text = f"---\nlicense: mit\ntags: {tags}\nsteps: {number}\n---\n"
    sections = {"intro": f"# Model\n\nScore {number}.", "usage": f"```python\nprint({number})\n\n\nprint()\n```"}
    sections |= {"limits": f"- limit {number}"} if limits else {}
    body = "\n\n".join(f"<!-- lingudistill:{n} -->\n{s}\n<!-- /lingudistill:{n} -->" for n, s in sections.items())
    return sealed(f"{text}\n{body}\n")


def again(text: str, number: int, **changes: bool) -> tuple[str, tuple[str, ...]]:
    return merged(card(number, **changes), text)


def front(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---")[1])


def test_without_an_edit_the_card_is_the_new_one_to_the_letter() -> None:
    assert again(card(1), 2) == (card(2), ())
    assert card(1) != card(2) and is_ours(card(1)) and not is_ours("# Mine\n")  # control


EDITS: dict[str, tuple[Edit, str, tuple[str, ...]]] = {
    "a sentence in a section": (lambda t: t.replace("Score 1.", "Score 1, which I doubt."), "which I doubt", ("intro",)),
    "a section between two": (lambda t: t.replace("<!-- lingudistill:limits", "## My notes\n\nHello.\n\n<!-- lingudistill:limits"), "## My notes", (OWN_TEXT,)),
    "a line at the end": (lambda t: t.replace("<!-- lingudistill-state", "Thanks to Ann.\n\n<!-- lingudistill-state"), "Thanks to Ann.", (OWN_TEXT,)),
    "a line at the top": (lambda t: t.replace("<!-- lingudistill:intro", "![banner](x.png)\n\n<!-- lingudistill:intro", 1), "![banner](x.png)", (OWN_TEXT,)),
    "a licence": (lambda t: t.replace("license: mit", "license: gemma"), "license: gemma", ("license",)),
    "a tag": (lambda t: t.replace("[one, two]", "[one, two, three]"), ", three]", ("tags",)),
    "a comment": (lambda t: t.replace("license: mit", "# chosen by Ann\nlicense: mit"), "# chosen by Ann\nlicense: mit", ("license",)),
    "a comment beside": (lambda t: t.replace("license: mit", "license: mit  # for now"), "license: mit  # for now", ("license",)),
    "a value that YAML 1.1 reads as another": (lambda t: t.replace("license: mit", "license: mit\nlanguage: [no]\nlength: 1:30"), "language: [no]\nlength: 1:30\n", ("language", "length")),
    "a value beside signs of YAML": (lambda t: t.replace("license: mit", "license: mit\nabout: this & that * 2\nlanguage: [no]"), "language: [no]\n", ("about", "language")),
    "lines of a text": (lambda t: t.replace("license: mit", "license: mit\nabout: |\n  # one\n\n  two #2"), "about: |\n  # one\n\n  two #2\n", ("about",)),
    "a copy of a section": (lambda t: t.replace("<!-- lingudistill-state", "<!-- lingudistill:limits -->\n- copied\n<!-- /lingudistill:limits -->\n\n<!-- lingudistill-state"), "- copied", (OWN_TEXT,)),
    "metadata of their own": (lambda t: t.replace("license: mit", "license: mit\nthumbnail: x.png"), "thumbnail: x.png", ("thumbnail",)),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_stays_and_the_rest_is_renewed(name: str) -> None:
    edit, trace, kept = EDITS[name]
    edited = edit(card(1))
    assert trace in edited and trace not in card(1)  # control: it is an edit
    text = edited
    for number in (2, 3):  # the second time as well: what was kept must not pass for ours
        text, said = again(text, number)
        assert trace in text and said == kept
        assert front(text)["steps"] == number and f"print({number})" in text and f"limit {number}" in text
        assert (f"Score {number}." in text) == (kept != ("intro",))


def test_a_card_with_many_edits_is_the_same_whenever_it_is_rendered() -> None:
    """It would be sent again, now and then: sets of texts have another order in every process."""
    text = card(1)
    for edit, _, _ in EDITS.values():
        text = edit(text)
    first, said = again(text, 2)
    state = list(json.loads(re.findall(r"^\{.*\}$", first, re.MULTILINE)[-1]))
    edited = state[-len(said) :]
    assert len(said) >= 4 and edited == sorted(edited)
    assert {part.partition(" ")[2] or OWN_TEXT for part in edited} == set(said)
    assert again(first, 2)[0] == first


def test_the_end_of_the_line_is_no_edit() -> None:
    """The Hub's editor may write either, and blank lines at will."""
    assert again(card(1).replace("\n", "\r\n"), 2) == (card(2), ())
    assert again(card(1).replace("\n\n", "\n\n\n"), 2) == (card(2), ())
    reordered = card(1).replace("license: mit\n", "").replace("steps: 1\n", "steps: 1\nlicense: mit\n")
    assert reordered != card(1) and front(again(reordered, 2)[0]) == front(card(2))


def test_what_was_deleted_stays_deleted() -> None:
    text = re.sub(r"<!-- lingudistill:limits -->.*?<!-- /lingudistill:limits -->", "", card(1), flags=re.DOTALL)
    text = text.replace("license: mit\n", "")
    for number in (2, 3):
        text, said = again(text, number)
        assert "limit " not in text and "license" not in front(text) and f"Score {number}." in text
        assert set(said) == {"license", "limits", OWN_TEXT}


def test_a_section_that_is_new_is_added_to_an_edited_card() -> None:
    old = EDITS["a line at the top"][0](card(1, limits=False))
    text, _ = again(old, 2)
    assert "limit 2" in text and text.index("banner") < text.index("Score 2") < text.index("limit 2")
    assert "limit 2" not in again(old, 2, limits=False)[0]  # control


def test_an_edited_section_outlives_its_template() -> None:
    edited = card(1).replace("- limit 1", "- my own limit")
    assert "my own limit" in again(edited, 2, limits=False)[0]
    assert (
        "limit" not in again(card(1), 2, limits=False)[0].split("lingudistill-state")[0]
    )  # control: unedited, it goes


def test_a_strangers_card_stays_whole_and_ours_comes_after_it() -> None:
    theirs = "---\nlicense: gemma\nwidget: x\n---\n\n# Theirs\n\nA long story.\n"
    text, kept = again(theirs, 2)
    assert text.index("A long story.") < text.index("Score 2.") and "limit 2" in text
    assert front(text) == {"license": "gemma", "tags": ["one", "two"], "steps": 2, "widget": "x"}
    assert set(kept) == {"license", "widget", OWN_TEXT}
    text, _ = again(text, 3)
    assert text.count("A long story.") == 1 and text.count("# Model") == 1 and "Score 3." in text
    # a repository that holds a licence alone, as the Hub's form makes it
    text, kept = again("---\nlicense: gemma\n---\n", 2)
    assert (front(text)["license"], kept) == ("gemma", ("license",)) and "# Model" in text


def test_a_card_without_its_digests_is_kept_as_it_is() -> None:
    for broken in (card(1).split("<!-- lingudistill-state")[0], card(1).replace('{"metadata', "{metadata")):
        text, kept = again(broken, 2)
        assert "Score 1." in text and {"intro", "usage", "limits"} <= set(kept)


def test_the_section_on_the_licence_follows_one_that_is_set_by_hand() -> None:
    """Ours beside theirs would be two licences on one card. Control: without an edit it is ours."""

    def licensed(number: int) -> str:
        text = "<!-- lingudistill:licence -->\n## Licence\n\n`mit`, inherited.\n<!-- /lingudistill:licence -->"
        return sealed(f"---\nlicense: mit\nsteps: {number}\n---\n\n{text}\n")

    text = licensed(1).replace("license: mit", "license: gemma")
    for number in (2, 3):
        text, kept = merged(licensed(number), text)
        assert "`gemma`, set by hand" in text and "`mit`" not in text and kept == ("license",)
    assert merged(licensed(2), licensed(1)) == (licensed(2), ())
    own = licensed(1).replace("license: mit", "license: gemma").replace("`mit`, inherited.", "Ask me.")
    text, kept = merged(licensed(2), own)
    assert "Ask me." in text and "set by hand" not in text and kept == ("license", "licence")
    other = licensed(1).replace("license: mit", "license: other\nlicense_name: mine")
    assert "`mine`, set by hand" in merged(licensed(2), other)[0]


def test_anchors_and_braces_keep_their_values() -> None:
    """Their lines stand for several keys, or for none: they are written anew. Control: `three` is another value."""
    for theirs in ("tags: &t [one]\nothers: *t", "{tags: [one], others: [one]}"):
        text = again(f"---\n{theirs}\n---\n# Mine\n", 2)[0]
        assert front(text)["tags"] == front(text)["others"] == ["one"] != ["three"] and front(text)["steps"] == 2


@pytest.mark.parametrize("metadata", ["a: [", "- a list", "just text", "license: mit\nlicense: gemma"])
def test_metadata_that_cannot_be_read_is_refused_and_not_replaced(metadata: str) -> None:
    with pytest.raises(UnreadableCard, match="its metadata"):
        again(f"---\n{metadata}\n---\n# Hello\n", 2)


@settings(max_examples=100)
@given(st.text(max_size=80), st.integers(0, 400))
def test_no_text_is_lost_wherever_it_is_written(text: str, at: int) -> None:
    """Letters that somebody types anywhere in the body are still there after two more renderings."""
    words = " ".join(re.findall(r"\w+", text, re.ASCII)) or "word"
    body = card(1).index("<!-- lingudistill:intro")
    end = card(1).index("<!-- lingudistill-state")
    at = body + at % (end - body)
    edited = f"{card(1)[:at]}\n{words}-mine\n{card(1)[at:]}"
    for number in (2, 3):
        edited, _ = again(edited, number)
    assert f"{words}-mine" in edited
