"""Writes docs/contract.md and docs/attributes.md from the contract: `make docs`. A test says when they are old."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import yaml
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

DOCS = Path(__file__).parents[1] / "docs"


def contract_page() -> str:
    """Every service, method, message and field, in the words of the .proto files."""
    files = FileDescriptorSet.FromString((resources.files("lending") / "descriptors.binpb").read_bytes())
    lines = ["# Contract reference", "", "Generated from `protos/` by `make docs`.", ""]
    for file in files.file:
        if file.package.startswith("lending."):
            lines += _file(file)
    return "\n".join(lines) + "\n"


def attributes_page() -> str:
    """The attribute dictionary as a table."""
    read = yaml.safe_load((resources.files("lending.bureau.v1") / "attributes.yaml").read_text(encoding="utf-8"))
    lines = ["# Attributes", "", "Generated from `protos/lending/bureau/v1/attributes.yaml` by `make docs`.", ""]
    lines += ["| attribute | source | type | unit | of | meaning | 含义 |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {a['source']} | {a['type']} | {a['unit']} | {', '.join(a['of'])} | {a['en']} | {a['zh']} |"
        for name, a in read["attributes"].items()
    ]
    return "\n".join(lines) + "\n"


def _file(file: FileDescriptorProto) -> Iterator[str]:
    said = {tuple(place.path): " ".join(place.leading_comments.split()) for place in file.source_code_info.location}
    yield f"## {file.package}"
    yield ""
    for s, service in enumerate(file.service):
        yield f"### {service.name}"
        yield ""
        yield said.get((6, s), "")
        yield ""
        for m, method in enumerate(service.method):
            yield f"* **{method.name}**: {said.get((6, s, 2, m), '')}"
        yield ""
    for number, message in enumerate(file.message_type):
        yield from _message(message, message.name, (4, number), said)


def _message(
    message: DescriptorProto, name: str, path: tuple[int, ...], said: dict[tuple[int, ...], str]
) -> Iterator[str]:
    yield f"#### {name}"
    yield ""
    yield said.get(path, "")
    yield ""
    for number, field in enumerate(message.field):
        kind = field.type_name.lstrip(".") or type(field).Type.Name(field.type).removeprefix("TYPE_").lower()
        many = "repeated " if field.label == field.LABEL_REPEATED else ""
        yield f"* `{field.name}` {many}{kind}: {said.get((*path, 2, number), '')}"
    yield ""
    for number, inner in enumerate(message.nested_type):
        if not inner.options.map_entry:
            yield from _message(inner, f"{name}.{inner.name}", (*path, 3, number), said)


def pages() -> dict[Path, str]:
    """Each page and what should stand in it."""
    return {DOCS / "contract.md": contract_page(), DOCS / "attributes.md": attributes_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
