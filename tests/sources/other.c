/* What kinds.c refers to. */
int shared = 7;
__thread int outer_thread = 9;
const float factors[8] = {1, 2, 3, 4, 5, 6, 7, 8};
const int lookup[8] = {8, 7, 6, 5, 4, 3, 2, 1};
int outside(int n) { return n * n + shared; }
