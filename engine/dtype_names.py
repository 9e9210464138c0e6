"""Names of what a pass computes in, for those who know no torch yet."""

FLOATS = ("float32", "bfloat16", "float16")
# of eight bits, and the floats that may stand beside them
QUANTIZED = {"int8": ("float32", "bfloat16"), "float8": ("bfloat16",)}
NAMES = ("auto", *FLOATS, *QUANTIZED, *(f"{products}+{name}" for products in QUANTIZED for name in QUANTIZED[products]))


def leaves_open(dtype: str) -> bool:
    """Whether what is faster decides: `auto`, and eight bits without the floats beside them."""
    return dtype == "auto" or dtype in QUANTIZED


def kept_dtype(asked: str, written: str) -> str:
    """The name to go on by with what was begun in `written`: that, as far as `asked` leaves it open."""
    return written if asked == "auto" or written.startswith(f"{asked}+") else asked
