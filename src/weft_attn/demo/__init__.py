"""The demonstration: real documents, packed, on zigzag ranks, checked against one device."""
