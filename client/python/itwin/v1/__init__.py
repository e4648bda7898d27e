"""Messages and stubs generated from proto/itwin/v1 when the project is built."""
