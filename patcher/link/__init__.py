"""PURE: the relocation table, the plan of what goes where, and the bytes that come out.

Never sees a process or a file: addresses and blocks in, bytes and addresses out.
"""
