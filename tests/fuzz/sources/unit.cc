// What C++ adds: COMDAT groups, vtables, templates, guards, exceptions. PREFIX keeps the variants apart.
#include <exception>

#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)
#define N(x) NAME(PREFIX, _##x)

namespace PREFIX {

struct Failure : std::exception {
    int code;
    explicit Failure(int code) : code(code) {}
};

struct Shape {
    int side = 2;
    virtual ~Shape() {}
    virtual int area() const = 0;
};

struct Square : Shape {
    int area() const override { return side * side; }
};

template <typename T> struct Box {
    T value;
    T twice() const { return value + value; }
    static inline int made = 3;
};

template <typename T> __attribute__((noinline)) T larger(T a, T b)
{
    return a > b ? a : b;
}

inline thread_local int depth = 1;

__attribute__((noinline)) int fail(int n)
{
    if (n > 3)
        throw Failure(n);
    return n;
}

static Shape &shape()
{
    static Square square;
    return square;
}

} // namespace PREFIX

using namespace PREFIX;

extern "C" int N(work)(int n)
{
    try {
#ifdef EDIT
        static int rounds = 4;
        return fail(n) + shape().area() + larger<long>(n, rounds++) + Box<short>{3}.twice();
#else
        return fail(n) + shape().area() + larger(n, Box<int>::made);
#endif
    } catch (const Failure &failure) {
        return failure.code + depth++;
    }
}

extern "C" int N(boxed)(int n)
{
#ifdef EDIT
    n += 5;
#endif
    Box<int> box{n};
    return box.twice() + Box<int>::made;
}
