"""Chat templates: programs in Jinja that write a conversation as one text, as `titan.data.chat` needs it.

They come from elsewhere, with a model. So they run in Jinja's sandbox: a template sees no attribute of Python's own, reads no
file, and changes nothing. What it finds there is what published templates expect, after
https://huggingface.co/docs/transformers/chat_templating, but for one thing: it is not told the date, so that the same rows are
the same data. Templates then write a fixed date, or fail.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2.nodes
    from jinja2.parser import Parser


def compiled(template: str) -> jinja2.Template:
    """The template, with what published ones expect to find. ValueError where it is no valid Jinja."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks an assistant's turn in some templates: its body is written as if unmarked."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"no valid Jinja, line {error.lineno}: {error.message}") from error
