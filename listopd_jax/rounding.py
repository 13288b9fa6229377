"""Whole numbers rounded up: widths, rows and budgets are multiples, so that few shapes are compiled."""


def ceil_div(n: int, parts: int) -> int:
    """n / parts, rounded up."""
    return -(-n // parts)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least n."""
    return ceil_div(n, multiple) * multiple
