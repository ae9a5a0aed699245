"""Messages and stubs generated from ``proto/`` by ``codegen.sh``, and DataFusion 55's own descriptors."""
