"""nvcc's PTX as C++ for the SIMT emulator: README.md says what for."""
