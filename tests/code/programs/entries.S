# Functions that start in every way that needs care when their first five bytes run elsewhere.
# Each is called as f(rdi, rsi, rdx = 9, rcx = a function, r8 = address of its address, r9, 8(%rsp) = it again).

        .macro entry name
        .pushsection .rodata.names, "a"
1:      .asciz "\name"
        .popsection
        .pushsection entries, "aw"
        .quad \name, 1b
        .popsection
        .p2align 4
        .globl \name
        .type \name, @function
\name:
        .endm
        .macro done name
        .size \name, . - \name
        .endm

        .data
byte_cell:  .byte 7
        .p2align 3
word_cell:  .short 0x1234
        .p2align 3
long_cell:  .long 0x01020304
        .p2align 4
quad_cell:  .quad 0x0102030405060708, 0x1112131415161718
pointer:    .quad give_back
table:      .quad give_back, carry

        .text
# What the callee sees: its return address, the carry, and its arguments.
        .type give_back, @function
give_back:
        sbb %rax, %rax
        add (%rsp), %rax
        lea (%rax, %rdi), %rax
        ret
        .size give_back, . - give_back
        .type carry, @function
carry:  sbb %rax, %rax
        add (%rsp), %rax
        ret
        .size carry, . - carry

entry call_after_push
        push %rbx
        call give_back
        pop %rbx
        ret
done call_after_push

entry call_keeps_flags
        cmp %rsi, %rdi
        call carry
        ret
done call_keeps_flags

entry call_with_addr32
        .byte 0x67
        call give_back
        ret
done call_with_addr32

entry call_register
        sub $8, %rsp
        call *%rcx
        add $8, %rsp
        ret
done call_register

entry call_rip
        push %rbx
        call *pointer(%rip)
        pop %rbx
        ret
done call_rip

entry call_memory
        sub $8, %rsp
        call *(%r8)
        add $8, %rsp
        ret
done call_memory

entry call_indexed
        xor %eax, %eax
        call *table+8(, %rax, 8)
        ret
done call_indexed

entry call_stack
        push %rbx
        call *16(%rsp)
        pop %rbx
        ret
done call_stack

entry call_stack_flags
        cmp %rsi, %rdi
        call *8(%rsp)
        ret
done call_stack_flags

        .irp condition, o, no, b, ae, e, ne, be, a, s, ns, p, np, l, ge, le, g
entry short_j\condition
        cmp %rsi, %rdi
        j\condition 2f
        mov $1, %eax
        ret
2:      mov $2, %eax
        ret
done short_j\condition
entry long_j\condition
        cmp %rsi, %rdi
        j\condition 2f
        mov $1, %eax
        ret
        .skip 200, 0x90
2:      mov $2, %eax
        ret
done long_j\condition
        .endr

entry three_branches
        jc 2f
        jo 3f
        js 4f
        mov $1, %eax
        ret
2:      mov $2, %eax
        ret
3:      mov $3, %eax
        ret
4:      mov $4, %eax
        ret
done three_branches

entry rip_load
        mov quad_cell(%rip), %rax
        ret
done rip_load

entry rip_address
        lea rip_address(%rip), %rax
        ret
done rip_address

entry rip_immediate_1
        addb $3, byte_cell(%rip)
        movzbl byte_cell(%rip), %eax
        ret
done rip_immediate_1

entry rip_immediate_2
        addw $0x111, word_cell(%rip)
        movzwl word_cell(%rip), %eax
        ret
done rip_immediate_2

entry rip_immediate_4
        movl $0x11223344, long_cell(%rip)
        mov long_cell(%rip), %eax
        ret
done rip_immediate_4

entry rip_wide_immediate
        movq $-5, quad_cell+8(%rip)
        mov quad_cell+8(%rip), %rax
        ret
done rip_wide_immediate

entry rip_multiply
        imul $1000, long_cell(%rip), %eax
        ret
done rip_multiply

entry rip_shuffle
        pshufd $0x1b, quad_cell(%rip), %xmm0
        movq %xmm0, %rax
        ret
done rip_shuffle

entry rip_after_endbr
        endbr64
        cmpl $9, long_cell(%rip)
        setg %al
        movzbl %al, %eax
        ret
done rip_after_endbr

entry loop_out
        mov %edi, %ecx
        loop 2f
        mov $1, %eax
        ret
2:      lea 2(%rcx), %rax
        ret
done loop_out

entry loop_equal
        mov %esi, %ecx
        loope 2f
        mov $1, %eax
        ret
2:      lea 2(%rcx), %rax
        ret
done loop_equal

entry loop_not_equal
        mov %esi, %ecx
        loopne 2f
        mov $1, %eax
        ret
2:      lea 2(%rcx), %rax
        ret
done loop_not_equal

entry zero_counter
        mov %edi, %ecx
        jrcxz 2f
        mov $1, %eax
        ret
2:      mov $2, %eax
        ret
done zero_counter

entry zero_counter_32
        mov %rdi, %rcx
        jecxz 2f
        mov $1, %eax
        ret
2:      mov $2, %eax
        ret
done zero_counter_32

entry loop_within
        mov %edx, %ecx
2:      loop 2b
        mov %rcx, %rax
        ret
done loop_within

entry branch_within
        xor %eax, %eax
2:      dec %dl
        jnz 2b
        mov %dl, %al
        ret
done branch_within

entry branch_to_start
        dec %dl
        jnz branch_to_start
        movzbl %dl, %eax
        ret
done branch_to_start

entry back_from_body
        lea -1(%rdx), %rdx
        add %rdi, %rsi
        test %dl, %dl
        jnz back_from_body
        mov %rsi, %rax
        ret
done back_from_body

entry jump_short
        jmp 2f
        .skip 20, 0xcc
2:      lea 5(%rdi), %rax
        ret
done jump_short

entry jump_long
        jmp 2f
        .skip 200, 0xcc
2:      lea 6(%rdi), %rax
        ret
done jump_long

entry jump_other
        jmp rip_load
done jump_other

entry jump_rip
        jmp *pointer(%rip)
done jump_rip

entry jump_register
        jmp *%rcx
        .p2align 4
done jump_register

entry short_zero
        xor %eax, %eax
        ret
done short_zero
        .p2align 4

entry short_jump
        jmp rip_multiply
done short_jump
        .p2align 4, 0xcc

entry return_within
        test %edi, %edi
        je 2f
        xchg %edi, %eax
        ret
2:      mov $77, %eax
        ret
done return_within

entry saved_registers
        push %rbp
        mov %rsp, %rbp
        push %rbx
        lea (%rdi, %rsi), %rax
        pop %rbx
        leave
        ret
done saved_registers

entry red_zone
        mov %rdi, -8(%rsp)
        mov %rsi, -16(%rsp)
        mov -8(%rsp), %rax
        xor -16(%rsp), %rax
        ret
done red_zone

        .section .note.GNU-stack, "", @progbits
