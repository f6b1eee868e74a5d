"""The README and its code blocks, which the tests run as printed."""

import re
import textwrap

from tests.standins.process import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in this language."""
    pattern = rf"^( *)```{language}\n(.*?)^\1```$"
    found = re.findall(pattern, README, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]
