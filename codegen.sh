#!/usr/bin/env bash
# Generates worker/proto from proto.
#   ./codegen.sh          writes the modules and their type stubs
#   ./codegen.sh --check  fails if they are not what would be written
set -euo pipefail
cd "$(dirname "$0")"

# Generated code refuses a grpcio or protobuf older than its generator, so these pins set the floors in pyproject.toml.
# grpcio-tools 1.72.1 is the oldest that generates for protobuf 6, which protobuf 7 still supports.
pins=(grpcio-tools==1.72.1 mypy-protobuf==5.1.0)

case "$*" in
  "" | --check) ;;
  *) echo "usage: $0 [--check]" >&2; exit 2 ;;
esac

venv=.codegen/$(IFS=+; echo "${pins[*]}")
if ! "$venv/bin/python" -c 'import grpc_tools.protoc, mypy_protobuf.main' 2>/dev/null; then
  for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11 ""; do
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break
  done
  [[ $python ]] || { echo "$0: needs Python 3.11, 3.12 or 3.13, which ${pins[0]} has wheels for" >&2; exit 1; }
  "$python" -m venv --clear "$venv"
  echo '*' >.codegen/.gitignore
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary=:all: "${pins[@]}" >&2
fi

new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

generate() { # options and files of protoc
  PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc \
    -Iworker/proto=proto --python_out="$new" --mypy_out=quiet:"$new" "$@"
}
generate worker/proto/plan.proto worker/proto/nodes.proto
# The stubs are for grpc.aio alone, and a servicer need not implement every method.
generate --grpc_python_out="$new" --mypy_grpc_out=quiet,only_async,generate_concrete_servicer_stubs:"$new" \
  worker/proto/Flight.proto worker/proto/worker.proto worker/proto/observability.proto

if [[ $* == --check ]]; then
  if ! diff -ru --exclude=__init__.py --exclude='*.binpb' --exclude=__pycache__ worker/proto "$new/worker/proto"; then
    echo "$0: worker/proto is not what proto generates: run ./codegen.sh and commit the result" >&2
    exit 1
  fi
else
  rm -f worker/proto/*_pb2*.py*
  cp "$new"/worker/proto/* worker/proto/
fi
