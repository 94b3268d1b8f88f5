"""The source of library functions, where the source is the lesson."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable

from IPython.display import Markdown


def source(*functions: Callable) -> Markdown:
    """Show functions, methods or classes as Python code, one after the other."""
    code = "\n\n".join(textwrap.dedent(inspect.getsource(one)).rstrip() for one in functions)
    return Markdown(f"```python\n{code}\n```")
