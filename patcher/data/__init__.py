"""DATA: what becomes of a program's variables when its code changes.

Decides which live variable one of an object is (`statics`; its evidence: `names`, `uses`, `declared`, `sites`), whether
old data and new code agree on the layout of types (`dwarf`), and has the words for the outcome (`outcome`). Where a
variable stands is `linkage`'s business.
"""
