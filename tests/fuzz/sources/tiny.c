/* The smallest unit with types, for objects that are damaged by hand. */
struct pair {
    int left;
    long right;
};
struct pair tiny_pair = {1, 2};

int tiny_work(int n)
{
#ifdef EDIT
    n += 7;
#endif
    return n + tiny_pair.left;
}
