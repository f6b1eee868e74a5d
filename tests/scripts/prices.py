"""What shop.py imports, as any module that is beside it."""

APPLE = "An apple is one euro."
