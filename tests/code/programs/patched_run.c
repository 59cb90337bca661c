/* Runs run(), with its own text patched first when a file of patches is given.
 *
 * The file: { u64 address; u32 size; bytes }... Addresses in AREA are mapped for it. The first byte of each
 * record of FLAGS is set by a patched entry; how many are set goes to stderr at the end.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* The kernel puts the heap anywhere in the GiB above the image; these lie above that, within reach of the text. */
#define AREA 0x60000000ul
#define AREA_SIZE 0x1000000ul
#define FLAGS 0x70000000ul
#define FLAGS_SIZE 0x10000ul

extern char __executable_start[], etext[];
void run(void);

static unsigned char patches[8 << 20];

static void apply(const char *path)
{
    int file = open(path, O_RDONLY);
    ssize_t size = read(file, patches, sizeof patches);
    int all = PROT_READ | PROT_WRITE | PROT_EXEC, fixed = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    uintptr_t text = (uintptr_t)__executable_start & ~4095ul;
    if (file < 0 || size <= 0 || mmap((void *)AREA, AREA_SIZE, all, fixed, -1, 0) != (void *)AREA ||
        mmap((void *)FLAGS, FLAGS_SIZE, all, fixed, -1, 0) != (void *)FLAGS ||
        mprotect((void *)text, ((uintptr_t)etext - text + 4095) & ~4095ul, all) != 0)
        abort();
    close(file);
    /* volatile: no call of memcpy may come out of this, for its entry is being written */
    volatile unsigned char *at = patches, *end = patches + size;
    while (at < end) {
        uint64_t address = 0, bytes = 0;
        for (int i = 0; i < 8; i++)
            address |= (uint64_t)at[i] << 8 * i;
        for (int i = 0; i < 4; i++)
            bytes |= (uint64_t)at[8 + i] << 8 * i;
        at += 12;
        for (uint64_t i = 0; i < bytes; i++)
            ((volatile unsigned char *)address)[i] = *at++;
    }
}

int main(int argc, char **argv)
{
    if (argc > 1)
        apply(argv[1]);
    run();
    fflush(stdout);
    if (argc > 1) {
        int entered = 0;
        for (unsigned long i = 0; i < FLAGS_SIZE; i++)
            entered += ((volatile unsigned char *)FLAGS)[i];
        fprintf(stderr, "%d\n", entered);
    }
    return 0;
}
