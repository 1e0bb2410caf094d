"""Generated text of eight domains: small grammars of code, markup, logs and prose, each with words of its own.

Only `random.Random(seed).random()` draws, whose sequence Python keeps over versions: the same bytes on every machine.
In a template @a @b @c are words that stay the same within it (@A is capitalised), @w any word, @n a number, @x a
variable, @m a chess move, # a digit.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

DOCUMENT_BYTES = 2000
WORDS = 400  # of a domain
SYLLABLES = [consonant + vowel for consonant in "bcdfghklmnprstvwz" for vowel in "aeiou"]
GRAMMARS: dict[str, Sequence[str]] = {
    "python": (
        "def @a_@b(self, @c):\n    if self.@b is None:\n        return @c\n    for @a in self.@b:\n        @c.append(@a)\n\n",
        "class @A@B(@C):\n    def __init__(self, @a=None):\n        super().__init__()\n        self.@a = @a\n\n",
        "    with open(@a) as @b:\n        @c = [line.strip() for line in @b]\n    assert len(@c) == @n, @a\n",
        "import @a\nfrom @b import @c as @w\n\n",
    ),
    "json": (
        '{"id": @n, "@a": "@b @w", "tags": ["@w", "@w"], "@c": {"valid": true, "size": 0.###}},\n',
        '{"id": @n, "@a": null, "@b": [@n, @n, @n], "@c": {"valid": false, "name": "@w"}},\n',
    ),
    "html": (
        '<div class="@a-@b">\n  <p id="@c">@w <b>@w</b> @w</p>\n</div>\n',
        '<ul>\n  <li><a href="/@a/@b.html">@c</a></li>\n  <li><a href="/@a/@w.html">@w</a></li>\n</ul>\n',
        '<img src="@a_@b.png" alt="@c" width="@n" height="@n">\n',
    ),
    "sql": (
        "SELECT @a.@b, COUNT(*) FROM @a JOIN @c ON @a.id = @c.@a_id WHERE @b > @n GROUP BY @a.@b;\n",
        "INSERT INTO @a (@b, @c) VALUES (@n, '@w');\n",
        "UPDATE @a SET @b = '@w' WHERE @c IN (@n, @n) ORDER BY @b DESC LIMIT @n;\n",
    ),
    "logs": (
        "2026-0#-1# 1#:2#:3# [INFO] @a.@b: @w from 10.#.#.# took @n ms\n",
        "2026-0#-2# 0#:4#:1# [WARN] @a.@b: @w is slow, @n of @n retries\n",
        "2026-11-0# 1#:0#:5# [ERROR] @a.@b: cannot reach @w at 10.#.#.#:80##\n",
    ),
    "prose": (
        "The @a of the @b was never the same after that, and the @c knew it. ",
        "She had seen a @a with a @b before, but not under the @c.\n",
        "Because of the @a they did not @b to the @c; it was far too @w. ",
        "When will the @a @b again? Nobody in the @c could say.\n\n",
    ),
    "latex": (
        "\\begin{equation}\n  \\sum_{@x=1}^{@x} \\frac{@x^#}{@x + @x_#} \\leq \\int_0^{@x} f(@x)\\,d@x\n\\end{equation}\n",
        "Let $@x \\in \\mathbb{R}^{@x}$ and $\\alpha_{@x} = \\sqrt{@x^2 + @x^2}$. ",
        "\\label{eq:@a} \\cite{@b20##}, \\emph{@c}\n",
    ),
    "chess": [" ".join(f"{i}. @m @m" for i in range(1, moves)) + " 1-0\n\n" for moves in (8, 14, 20, 28)],
}


def documents(domain: str, size: int, *, held_out: bool = False) -> list[bytes]:
    """At least `size` bytes of a domain; what is held out has the same words and is drawn apart."""
    index = list(GRAMMARS).index(domain)
    words = _lexicon(random.Random(1000 + index))
    draw = random.Random(2000 + index + 100 * held_out)
    found: list[bytes] = []
    while sum(map(len, found)) < size:
        text = ""
        while len(text) < DOCUMENT_BYTES:
            text += _filled(_any(draw, GRAMMARS[domain]), words, draw)
        found.append(text.encode())
    return found


def _any(draw: random.Random, choices: Sequence[str]) -> str:
    return choices[int(draw.random() * len(choices))]


def _lexicon(draw: random.Random) -> list[str]:
    words: dict[str, None] = {}  # ordered set
    while len(words) < WORDS:
        words["".join(_any(draw, SYLLABLES) for _ in range(1 + int(draw.random() * 3)))] = None
    return list(words)


def _filled(template: str, words: Sequence[str], draw: random.Random) -> str:
    def word() -> str:
        return words[int(len(words) ** draw.random()) - 1]  # few are frequent: Zipf

    same = {name: word() for name in "abc"}

    def value(found: re.Match[str]) -> str:
        kind = found[0][-1]
        if kind in "abc":
            return same[kind]
        if kind in "ABC":
            return same[kind.lower()].capitalize()
        if kind == "w":
            return word()
        if kind == "n":
            return str(int(draw.random() * 1000))
        if kind == "x":
            return _any(draw, "xyzkmn")
        if kind == "m":
            return _any(draw, ("", "", "N", "B", "R", "Q", "Nx", "Bx")) + _any(draw, "abcdefgh") + _any(draw, "12345678")
        return _any(draw, "0123456789")

    return re.sub(r"@[abcABCwnxm]|#", value, template)
