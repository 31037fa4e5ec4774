"""Build hook: turns protos/ into the package `lending`, at install, so that generated code is never committed.

Runs protoc from grpcio-tools, with stubs for type checkers, into build/generated, and adds `descriptors.binpb` (the
contract as one file, for lint, comparison and reflection tools) and the data files that are part of the contract.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
GENERATED = ROOT / "build" / "generated"
PACKAGES = ("lending", "externalscaler", "buf")
"""What is generated: our contracts, KEDA's, and what they import."""


def generate(protos: Path, out: Path) -> None:
    """Write `lending` (and `buf.validate`, which it imports) below `out`. Raises RuntimeError when protoc fails."""
    from google.protobuf import descriptor_pb2, descriptor_pool
    from google.rpc import status_pb2
    from grpc_tools import protoc
    from protovalidate._gen.buf.validate import validate_pb as validate

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    known = descriptor_pb2.FileDescriptorSet()
    for name in ("descriptor", "duration", "timestamp", "field_mask", "any"):
        importlib.import_module(f"google.protobuf.{name}_pb2")
        descriptor_pool.Default().FindFileByName(f"google/protobuf/{name}.proto").CopyToProto(known.file.add())
    status_pb2.DESCRIPTOR.CopyToProto(known.file.add())
    # protovalidate ships its descriptor, not its .proto: hand it to protoc as a set, with what it imports.
    known.file.add().ParseFromString(validate._DESC.proto.to_binary())
    sources = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    plugins = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as scratch:
        known_path = Path(scratch) / "known.binpb"
        known_path.write_bytes(known.SerializeToString())
        code = protoc.main(
            [
                "protoc",
                f"--proto_path={protos}",
                f"--descriptor_set_in={known_path}",
                f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
                f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
                f"--python_out={out}",
                f"--grpc_python_out={out}",
                f"--mypy_out=quiet:{out}",
                f"--mypy_grpc_out=quiet:{out}",
                f"--descriptor_set_out={out / 'descriptors.binpb'}",
                "--include_imports",
                "--include_source_info",
                *sources,
                "buf/validate/validate.proto",
            ]
        )
    if code:
        raise RuntimeError(f"protoc ended with {code}; its words are above")
    (out / "descriptors.binpb").rename(out / "lending" / "descriptors.binpb")
    for data in protos.rglob("*.yaml"):
        shutil.copy(data, out / data.relative_to(protos))
    for folder in (out, *out.rglob("*/")):
        if folder != out:
            (folder / "__init__.py").touch()
    for package in PACKAGES:
        (out / package / "py.typed").touch()


class BuildProtos(BuildHookInterface[Any]):
    """Called by hatchling for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate, and name the generated packages as part of the wheel."""
        generate(ROOT / "protos", GENERATED)
        key = "force_include_editable" if version == "editable" else "force_include"
        for package in PACKAGES:
            build_data.setdefault(key, {})[str(GENERATED / package)] = package
