"""DATA: what becomes of a program's variables when its code changes.

Decides which live variable one of an object is (`statics`, by `scoped`, `rivals` and `moves`; the evidence: `known`,
`names`, `uses`, `located`, `sites`), whether old data and new code agree on the layout of types (`admission`, from
`declared`, `compare` and `layouts`; what compilers do not describe is asked for by `undescribed`, what earlier
controllers saw is found by `remembered`), which variables get new storage where they do not (`migrate`, by
`comparison`), which need no help with that (`carry`, by `shapes`) and who still refers to the old (`still_used`), what
becomes of initialisers and constants (`initial`, `constants`), and has the words for the outcome (`outcome`). Where a
variable stands is `linkage`'s business.
"""
