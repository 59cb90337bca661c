"""DATA: what becomes of a program's variables when its code changes.

Decides which live variable one of an object is (`statics`), whether old data and new code agree on the layout of
types (`dwarf`), which variables get new storage where they do not (`migrate`, `layout`) and who still refers to the old
(`holders`), and has the words for the outcome (`outcome`). Where a variable stands is `linkage`'s business.
"""
