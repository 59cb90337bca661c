"""Changes of types, each with what must be said of it; nothing, for those that are no change."""

from __future__ import annotations

from dataclasses import dataclass

C = """\
typedef long word;
typedef int count_t;
typedef char name_t[8];
enum colour { RED, GREEN };
struct inner { short a; short b; };
struct record { char tag; long value; struct inner inner; int list[4]; unsigned flag : 3; unsigned rest : 5; };
typedef struct { int x, y; } point;
union either { int i; char c[4]; };
struct chain { struct chain *next; struct record *record; void *any; int (*call)(int); };
struct deep { struct { int left, right; } pair; union { int i; float f; }; };
struct record records[3];
point where;
union either either;
enum colour colour;
int number = 3;
int *at_number = &number;
int table[3] = {1, 2, 3};
const int constants[2] = {1, 2};
static struct { int m, n; } bare;
struct chain chain;
struct deep deep;
name_t name;
__thread int per_thread;
extern int elsewhere;
int use(count_t n)
{
    static int calls;
    struct local { int p, q; } here = {n, 1};
    static struct local kept;
    calls += here.p + kept.q;
    kept.q++;
    return calls + where.x + either.i + colour + per_thread + bare.m + *at_number + table[1] + elsewhere
        + (int)records[0].value + chain.record->tag + deep.pair.left + name[0] + (int)(word)n;
}
"""

CPP = """\
namespace app {
struct item { int a; long b; };
struct shape { virtual int area(); virtual int edge(); virtual ~shape(); int size; };
struct left { int l; };
struct right { int r; };
struct both : left, right { int own; };
struct square : shape { int area() override; int side; };
class hidden { int secret; public: int get() const { return secret; } static int total; enum mode { A, B } mode; };
template <class T> struct box { T held; int n; };
enum class level : short { LOW, HIGH };
item items[2];
shape *shown;
square one;
both pair_of;
hidden secret;
int hidden::total;
box<int> numbers;
level now;
namespace { item inside; }
int shape::area() { return size; }
int shape::edge() { return 1; }
shape::~shape() {}
int square::area() { return side; }
int use(item &i, const item &j)
{
    static int calls;
    auto add = [&](int n) { return n + calls; };
    return i.a + j.a + shown->area() + one.side + pair_of.own + secret.get() + hidden::total + numbers.n + (int)now
        + inside.a + add(1);
}
}
"""


@dataclass(frozen=True)
class Case:
    """An edit, and the verdict expected: a type and a part of what is said, nothing if it is no change."""

    before: str
    after: str
    type: str = ""
    detail: str = ""


SAME = {
    "a member's name": Case("long value;", "long amount;"),
    "two members' names": Case("{ short a; short b; }", "{ short first; short second; }"),
    "const and volatile": Case("char tag;", "const volatile char tag;"),
    "a const variable": Case("int number = 3;", "volatile int number = 3;"),
    "another typedef": Case("char tag; long value;", "char tag; word value;"),
    "a typedef more": Case("typedef long word;", "typedef long word; typedef word *words; words unused_words;"),
    "a new type": Case("struct record records", "struct fresh { int x; } fresh; struct record records"),
    "a new variable": Case("union either either;", "union either either; int more[7];"),
    "an enumerator at the end": Case("GREEN }", "GREEN, BLUE }"),
    "a renamed enumerator": Case("RED, GREEN", "CRIMSON, GREEN"),
    "another sign": Case("int number = 3;", "unsigned number = 3;"),
    "a renamed local type": Case("struct local {", "struct near {"),
    "a tag for a struct without": Case("static struct {", "static struct tagged {"),
    "a declared bound": Case("extern int elsewhere;", "extern int elsewhere; extern int table[];"),
    "union members in another order": Case("int i; char c[4];", "char c[4]; int i;"),
    "a type of its own for the element": Case("int list[4];", "count_t list[4];"),
    "a pointer that may lead anywhere": Case("int *at_number", "void *at_number"),
    "a longer constant": Case("const int constants[2] = {1,", "const int constants[3] = {1, 1,"),
    "another function pointer": Case("int (*call)(int);", "long (*call)(long);"),
}
SAME_EDITS = {  # what has to be edited with it
    "a member's name": (".value", ".amount"),
    "a renamed local type": ("struct local kept", "struct near kept"),
    "a pointer that may lead anywhere": ("*at_number +", "*(int *)at_number +"),
}

CHANGED = {
    "a member in front": Case("char tag;", "int more; char tag;", "struct record", "`tag` offset 0 -> 4"),
    "an int hidden in padding": Case(
        "char tag;", "char tag; int hidden;", "struct record", "`hidden` is new at offset 4"
    ),
    "members swapped": Case("short a; short b;", "short b; short a;", "struct inner", "`a` offset 0 -> 2"),
    "a member gone": Case("int list[4];", "", "struct record", "`list` at offset 20 is gone"),
    "a longer array": Case("list[4]", "list[5]", "struct record", "has another type: int[4] -> int[5]"),
    "float for int": Case("int x, y;", "float x; int y;", "point", "`x` at offset 0 has another type: int -> float"),
    "double for long": Case("long value", "double value", "struct record", "`value` at offset 8 has another type"),
    "a pointer more": Case(
        "struct record *record;", "struct record **record;", "struct chain", "struct record * -> struct record **"
    ),
    "a pointer to another struct": Case(
        "struct record *record;", "struct inner *record;", "struct chain", "struct record * -> struct inner *"
    ),
    "a wider bit-field": Case("flag : 3", "flag : 4", "struct record", "`flag` at offset 36 bits 3 -> 4"),
    "no bit-field any more": Case("unsigned flag : 3", "unsigned flag", "struct record", "bits 3 -> all"),
    "a bit-field in front": Case("unsigned flag", "unsigned up : 1; unsigned flag", "struct record", "36 -> 36.1"),
    "an enumerator's value": Case("RED, GREEN", "RED, GREEN = 7", "enum colour", "`GREEN` 1 -> 7"),
    "an enumerator in front": Case("{ RED,", "{ BLACK, RED,", "enum colour", "`RED` 0 -> 1"),
    "an enumerator gone": Case("RED, GREEN }", "RED }", "enum colour", "`GREEN` (1) is gone"),
    "a struct without a tag": Case("int x, y;", "int y, z, x;", "point", "size 8 -> 12"),
    "a union": Case("char c[4]", "char c[8]", "union either", "size 4 -> 8"),
    "a nested struct": Case("short a; short b;", "short b; int a;", "struct inner", "size 4 -> 8"),
    "a struct within without a name": Case("int left, right;", "int right, left;", "struct deep", "`pair`"),
    "a union within without a name": Case("int i; float f;", "int i; double f;", "struct deep", "size 12 -> 16"),
    "a variable's bound": Case("int table[3]", "int table[4]", "table", "array bound 3 -> 4"),
    "a variable's type": Case("int number = 3;", "float number = 3;", "number", "type int -> float"),
    "what a variable leads to": Case("int *at_number = &", "long *at_number = (long *)&", "at_number", "-> long"),
    "a variable of no named type": Case("struct { int m, n; }", "struct { int m; float n; }", "bare", "`n`"),
    "a function's static": Case("static int calls;", "static float calls;", "use::calls", "type int -> float"),
    "a function's struct": Case("int p, q;", "int q, p;", "struct use::local", "`p` offset 0 -> 4"),
    "an extern variable": Case("extern int elsewhere;", "extern float elsewhere;", "elsewhere", "int -> float"),
    "a thread-local": Case("__thread int", "__thread float", "per_thread", "type int -> float"),
    "a typedef of a number": Case("typedef int count_t;", "typedef long count_t;", "count_t", "-> long"),
    "a typedef of an array": Case("typedef char name_t[8]", "typedef char name_t[9]", "name_t", "bound 8 -> 9"),
}
CHANGED_EDITS = {
    "a pointer more": ("chain.record->tag", "(*chain.record)->tag"),
    "a pointer to another struct": ("chain.record->tag", "chain.record->a"),
}
ONLY_GCC = ("an extern variable",)  # of what other units have, clang says nothing

SAME_CPP = {
    "a member function": Case("long b;", "long b; int sum() { return a + (int)b; }"),
    "a member's name": Case("long b;", "long c;"),
    "an override of what is virtual": Case("int area() override;", "int area() override; int edge() override;"),
    "access": Case("class hidden { int secret;", "class hidden { protected: int secret;"),
    "a static member": Case("static int total;", "static int total; static const int most = 3;"),
    "another lambda": Case("static int calls;", "static int calls;\n\n    auto more = [](long n) { return n; };"),
    "lines above a lambda": Case("static int calls;", "static int calls;\n\n"),
    "an enumerator at the end": Case("LOW, HIGH }", "LOW, HIGH, TOP }"),
    "a new instance of a template": Case("box<int> numbers;", "box<int> numbers; box<long> longs;"),
    "const": Case("int own;", "mutable int own;"),
}
CHANGED_CPP = {
    "a member": Case("int a; long b;", "int a; int x; long b;", "struct app::item", "`x` is new at offset 4"),
    "a virtual function more": Case(
        "virtual int edge();", "virtual int edge(); virtual int more();", "struct app::shape", "`more` is new in slot 2"
    ),
    "virtual functions in another order": Case(
        "virtual int area(); virtual int edge();", "virtual int edge(); virtual int area();", "struct app::shape",
        "virtual function `area` slot 0 -> 1",
    ),
    "a virtual function less": Case(
        "virtual int edge();", "int edge();", "struct app::shape", "virtual function `edge` in slot 1 is gone"
    ),
    "a virtual function with other arguments": Case(
        "virtual int edge();", "virtual int edge(int = 1);", "struct app::shape", "`edge`"
    ),
    "the first virtual function": Case(
        "struct left { int l; };", "struct left { int l; virtual int f() { return 1; } };", "struct app::left", "size"
    ),
    "base classes in another order": Case(
        "both : left, right", "both : right, left", "struct app::both", "base class `app::left` offset 0 -> 4"
    ),
    "a base class less": Case("both : left, right", "both : left", "struct app::both", "base class `app::right`"),
    "a base class that is virtual": Case("both : left,", "both : virtual left,", "struct app::both", "base class"),
    "a member of a class": Case("int secret;", "long secret;", "class app::hidden", "`secret`"),
    "a member of an instance": Case("T held; int n;", "int n; T held;", "struct app::box<int>", "`held` offset 0 -> 4"),
    "an enum's size": Case("level : short", "level : int", "enum app::level", "size 2 -> 4"),
    "a static member's type": Case(
        "static int total;", "static float total;", "app::hidden::total", "type int -> float"
    ),
    "an enum within a class": Case("enum mode { A, B }", "enum mode { B, A }", "enum app::hidden::mode", "`A` 0 -> 1"),
    "a variable without a visible name": Case(
        "namespace { item inside; }", "namespace { item inside[2]; }", "app::(anonymous namespace)::inside", "item"
    ),
}  # fmt: skip
CPP_EDITS = {
    "an override of what is virtual": ("int square::area()", "int square::edge() { return 4; } int square::area()"),
    "a virtual function more": ("int shape::edge()", "int shape::more() { return 2; } int shape::edge()"),
    "a virtual function with other arguments": ("int shape::edge()", "int shape::edge(int)"),
    "a static member's type": ("int hidden::total", "float hidden::total"),
    "a variable without a visible name": ("inside.a", "inside[0].a"),
}
