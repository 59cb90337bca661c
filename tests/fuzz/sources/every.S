/* Every relocation of an object that an assembler can be asked for. */
#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)
#define N(x) NAME(PREFIX, _##x)
#define FUNCTION(f) .globl f; .type f, @function; f:
#define END(f) .size f, . - f

    .text
    .p2align 4
FUNCTION(N(helper))
    lea 3(%rdi), %eax
    ret
END(N(helper))
    .p2align 4
FUNCTION(N(work))
    lea 1(%rdi), %eax
    ret
END(N(work))

    .p2align 4
FUNCTION(N(addresses))
#ifdef EDIT
    call N(helper)@PLT
    call N(helper)
    mov N(value)@GOTPCREL(%rip), %rax
    mov N(value)@GOTPCREL(%rip), %eax
    add N(value)(%rip), %eax
    cmpl $1, N(value)(%rip)
    movabs $N(value), %rax
    mov $N(value), %eax
    movq $N(value), %rax
    movabs $N(value)@GOTOFF, %rax
    movabs $N(value)@GOT, %rax
    movabs $N(value)@GOTPLT, %rax
    movabs $N(helper)@PLTOFF, %rax
    lea _GLOBAL_OFFSET_TABLE_(%rip), %rbx
    movabs $_GLOBAL_OFFSET_TABLE_ - ., %r11
    mov N(value)@GOT(%rbx), %rax
    mov $N(value)@SIZE, %eax
    movabs $N(value)@SIZE, %rax
    jmp *table(, %rdi, 8)
#else
    ret
    .fill 8, 1, 0x90
#endif
END(N(addresses))

    .p2align 4
FUNCTION(N(threads))
#ifdef EDIT
    mov %fs:N(mine)@TPOFF, %eax
    movabs $N(mine)@TPOFF, %rax
    mov N(mine)@GOTTPOFF(%rip), %rax
    .byte 0x66
    leaq N(mine)@TLSGD(%rip), %rdi
    .value 0x6666
    rex64
    call __tls_get_addr@PLT
    leaq N(mine)@TLSLD(%rip), %rdi
    call __tls_get_addr@PLT
    leaq N(mine)@DTPOFF(%rax), %rax
    movabs $N(mine)@DTPOFF, %rax
    leaq N(mine)@TLSDESC(%rip), %rax
    call *N(mine)@TLSCALL(%rax)
#endif
    ret
    .fill 8, 1, 0x90
END(N(threads))

    .data
    .globl N(value)
    .type N(value), @object
    .size N(value), 8
N(value):
    .quad 5
    .type other, @object
    .size other, 8
other:
    .quad 6

    .section .tdata, "awT", @progbits
    .globl N(mine)
    .type N(mine), @object
    .size N(mine), 4
N(mine):
    .long 7

#ifdef EDIT
    .section .rodata, "a", @progbits
    .type table, @object
table:
    .quad N(helper), N(addresses) + 4, other - .
    .quad N(value)@GOTPCREL
    .long N(helper) - ., other@SIZE, N(value)
    .quad N(value)@SIZE
    .word absolute
    .byte absolute
    .size table, . - table
    .section .rodata.narrow, "a"
    .type narrow, @object
narrow:
    .word N(helper) - .
    .byte N(helper) - .
    .size narrow, . - narrow
    .section .rodata.strings, "aMS", @progbits, 1
    .string "one"
    .string "two"
    .set absolute, 7
#endif
    .section .note.GNU-stack, "", @progbits
