"""INSTRUCTIONS of x86-64: decoding, entry jumps, displaced copies, call sites, split sections.

Bytes and numbers in, bytes out: nothing here sees a process or a file. The only importer of capstone.
Specification: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
"""
