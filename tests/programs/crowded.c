/* Fills the address space around itself, but for a given number of holes, then answers questions. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
int answer(int n);
static const unsigned long reach = (1ul << 31) + (64ul << 20), hole = 66ul << 20, near = (1ul << 31) - (128ul << 20);
static void fill(unsigned long start, unsigned long end)
{
    if (start < end && mmap((void *)start, end - start, PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED)
        exit(3);
}
static void crowd(int holes)
{
    unsigned long here = (unsigned long)crowd & -4096ul, low = here > reach ? here - reach : 1ul << 16, high = here + reach;
    unsigned long gaps[512][2], previous = low, start, end;
    int count = 0;
    char line[512];
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps) && sscanf(line, "%lx-%lx", &start, &end) == 2) {
        if (previous < start && previous < high && count < 512) {
            gaps[count][0] = previous;
            gaps[count++][1] = start < high ? start : high;
        }
        if (end > previous)
            previous = end;
    }
    fclose(maps);
    if (previous < high) {
        gaps[count][0] = previous;
        gaps[count++][1] = high;
    }
    for (int i = 0; i < count; i++) {
        if (holes > 0 && gaps[i][1] > here + near && gaps[i][0] + 2 * hole < here + near) {
            fill(here + near, gaps[i][1]); /* a hole at the very end could not be reached */
            gaps[i][1] = here + near;
        }
        while (holes > 0 && gaps[i][1] - gaps[i][0] > 2 * hole) {
            gaps[i][1] -= hole;
            fill(gaps[i][1] - 4096, gaps[i][1]);
            gaps[i][1] -= 4096;
            holes--;
        }
        fill(gaps[i][0], gaps[i][1]);
    }
}
int others;
int other(int n) { return n + others++; }
int main(int argc, char **argv)
{
    int n;
    setvbuf(stdout, NULL, _IONBF, 0);
    crowd(argc > 1 ? atoi(argv[1]) : 0);
    puts("ready");
    while (scanf("%d", &n) == 1)
        printf("%d\n", answer(n));
}
