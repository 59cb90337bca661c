/* A static program without a C library: no rt_sigreturn in it. Says "ready", then echoes what it reads. */
static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall\n\tnop" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
void _start(void)
{
    char line[64];
    long length;
    call(1, 1, (long)"ready\n", 6);
    while ((length = call(0, 0, (long)line, sizeof line)) > 0)
        call(1, 1, (long)line, length);
    call(231, length == 0 ? 0 : 9, 0, 0);
}
