"""YAML as people write it for us: plain data of bounded size and depth, each name once.

The rest of YAML is left out for what it can do to whoever reads it. With an alias a list can hold itself, which native
code that walks it follows until the process dies; ten lines of aliases unfold to gigabytes; a name that stands twice
silently loses its first value.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

NESTED_MAX = 32
"""Lists and mappings within each other. Our own files need 6."""
CHARS_MAX = 1_000_000
"""Our own files have up to 20,000."""

WORD_CHARS_MAX = 4_000
"""Of one name or value. Our own texts have up to 400."""


class WrongYaml(Exception):
    """A text is not that; its words are the problem alone."""

    def __init__(self, problem: str, mark: Any = None) -> None:
        super().__init__(problem)
        self.place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        """To be set behind the file's name: `:3:17`, or nothing where no place is known."""


def read_yaml(text: str) -> Any:
    """What the text says. Raises WrongYaml."""
    if len(text) > CHARS_MAX:
        raise WrongYaml(f"is longer than {CHARS_MAX:,} characters")
    try:
        return yaml.load(text, Loader=_Plain)
    except yaml.MarkedYAMLError as error:
        raise WrongYaml(f"is no YAML: {error.problem}", error.problem_mark) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that cannot be.
        raise WrongYaml(f"is no YAML: {str(error).splitlines()[0][:200]}") from error


class _Plain(yaml.SafeLoader):
    """Safe, and refuses what the module's text names."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """The word, if it is none that no message could show."""
        if isinstance(node.value, str) and len(node.value) > WORD_CHARS_MAX:
            raise WrongYaml(f"a name or value is longer than {WORD_CHARS_MAX:,} characters", node.start_mark)
        return super().construct_scalar(node)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, where it may stand."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]  # Bare in its stubs.
        if isinstance(event, yaml.AliasEvent):
            raise WrongYaml(f"*{event.anchor} stands for something else: write that out", event.start_mark)
        if self._depth == NESTED_MAX:
            raise WrongYaml(f"lists and mappings nest deeper than {NESTED_MAX}", event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping, if each of its names stands there once."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise WrongYaml(f"{key.value[:80]} stands there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)
