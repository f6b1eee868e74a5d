#!/usr/bin/env bash
# pysbd cuts a telephone menu before its keys, not after them, once anything follows the second key.
#
# Seen with pysbd 0.3.4 on Python 3.11.7.
#
# "For sales, press 1. For support, press 2." is cut where one would cut it. When "Or hold the line."
# follows, the same splitter cuts before "1." and before "2.", and no longer after them: two numbers
# in a row, each with a full stop and a text after it, are taken for the items of a list. One would
# expect the end of the first sentence not to depend on what comes two sentences later, and the
# items of a list to stand at the beginning of something.
#
# Why it matters here: a program that has each piece synthesized on its own, so that speech starts
# early, makes the voice end and pause at each cut. Callers then hear "For sales, press", a pause,
# "1. For support, press", a pause, "2. Or hold the line.": every key seems to belong to the option
# after it. A test with keys 1 and 3, with "press one", with "Press 1 for sales.", or with a menu that
# ends at its last key does not show it. And while a model is still writing, cuts that were right
# become wrong when its next words arrive.
#
# What was seen, | being a cut:
#
#   For sales, press 1. | For support, press 2.
#   For sales, press | 1. For support, press | 2. Or hold the line.
#   For sales, press 1. | For support, press 3. | Or hold the line.
#   Press 1 for sales. | Press 2 for support. | Or hold the line.
#   The train leaves from platform | 4. It leaves at | 5. Have a good trip.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check pysbd==0.3.4
"$dir/venv/bin/python" - <<'PYTHON'
import sys

import pysbd

EXPECTED = [
    "For sales, press 1. | For support, press 2.",
    "For sales, press | 1. For support, press | 2. Or hold the line.",
    "For sales, press 1. | For support, press 3. | Or hold the line.",
    "Press 1 for sales. | Press 2 for support. | Or hold the line.",
    "The train leaves from platform | 4. It leaves at | 5. Have a good trip.",
]
splitter = pysbd.Segmenter(language="en", clean=False)
seen = []
for cut in EXPECTED:
    pieces = splitter.segment(cut.replace(" | ", " "))
    seen.append(" | ".join(piece.strip() for piece in pieces))
    print(seen[-1])
if seen != EXPECTED:
    sys.exit("This has changed.")
PYTHON
