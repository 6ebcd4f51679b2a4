# SPDX-License-Identifier: Apache-2.0
"""`recipes.cite`: complete BibTeX, each entry once."""

import re

import pytest

from optax_rms import recipes

RECIPES = {name: getattr(recipes, name) for name in recipes.__all__ if name != "cite"}


def parse(entries):
    """Fields of every entry by key; braces must match and fields must be closed."""
    parsed = {}
    for entry in re.split(r"\n\n(?=@)", entries):
        kind, key, body = re.fullmatch(
            r"@(\w+)\{(\w+),\n(.*)\n\}", entry, re.S
        ).groups()
        fields = re.findall(r"  (\w+) = \{(.*?)\}(?:,\n(?=  \w)|$)", body, re.S)
        assert ",\n".join(f"  {k} = {{{v}}}" for k, v in fields) == body
        assert all(v.count("{") == v.count("}") for _, v in fields)
        assert key not in parsed
        parsed[key] = {"kind": kind, **dict(fields)}
    return parsed


def link_of(fields):
    """The part of an entry that leads to the paper or program."""
    keys = fields.keys() & {"doi", "eprint", "url", "howpublished"}
    assert len(keys) == 1
    return re.sub(r"\\url\{(.*)\}", r"\1", fields[keys.pop()])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_complete_entries(name):
    entries = parse(recipes.cite(RECIPES[name]))
    assert entries
    for key, fields in entries.items():
        assert {"title", "author", "year"} <= fields.keys()
        # First author's name, year, first word of the title.
        assert re.fullmatch(rf"[a-z]+{fields['year']}[a-z0-9]+", key)


@pytest.mark.parametrize("name", RECIPES)
def test_the_entries_are_the_references_of_the_docstrings(name):
    """The last one is a reference of this recipe, and all are of some recipe."""
    everywhere = "".join(str(recipe.__doc__) for recipe in RECIPES.values())
    *others, own = parse(recipes.cite(RECIPES[name])).values()
    assert link_of(own) in RECIPES[name].__doc__
    assert all(link_of(fields) in everywhere for fields in others)


def test_an_entry_of_two_recipes_occurs_once():
    both = parse(recipes.cite(recipes.dqn, recipes.dqn_zoo))
    assert list(both) == ["mnih2015human", "quan2020dqnzoo"]
    assert recipes.cite() == ""


def test_something_else_is_refused():
    with pytest.raises(ValueError, match=r"cite needs functions .* got 'dqn'"):
        recipes.cite("dqn")
    with pytest.raises(ValueError, match="Pass the function itself"):
        recipes.cite(recipes.dqn())
