# Drives a memory-mapped device for 16 rounds, each a write to its register 0 and a read of its
# register 4, and reports the sum of what it read. Loaded at 0x7c00 in real mode, it switches to
# protected mode with flat segments, because the device lies at 0xe0000000.

        .equ    DEVICE, 0xe0000000
        .equ    ROUNDS, 16
        .equ    RESULT, 0x4f0

        .code16
        .globl  _start
_start: ljmp    $0, $1f
1:      cli
        xorw    %ax, %ax
        movw    %ax, %ds
        lgdtl   gdtr
        movl    %cr0, %eax
        orb     $1, %al                 # CR0.PE
        movl    %eax, %cr0
        ljmpl   $8, $flat

        .code32
flat:   movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        cld

        movl    $DEVICE, %edi
        xorl    %ebp, %ebp              # the sum
        xorl    %eax, %eax              # what is written: multiples of the golden ratio
        movl    $ROUNDS, %ecx
2:      addl    $0x9e3779b9, %eax
        movl    %eax, (%edi)
        addl    4(%edi), %ebp
        loop    2b

        movl    $text, %esi
        movw    $0x3f8, %dx
3:      lodsb
        testb   %al, %al
        jz      4f
        outb    %al, %dx
        jmp     3b

4:      movl    %ebp, %eax
        movw    $RESULT, %dx
        outl    %eax, %dx
5:      hlt
        jmp     5b

text:   .asciz  "16 rounds with the device\n"

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # 8: code, 32 bits, base 0, 4 GiB
        .quad   0x00cf93000000ffff      # 16: data, the same
gdtr:   .word   . - gdt - 1
        .long   gdt
