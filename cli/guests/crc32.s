# Writes 1024 bytes of a linear congruential sequence to 0x10000, computes their CRC-32 (the
# polynomial of Ethernet, reflected: 0xedb88320) bit by bit, and reports it through the result
# port. Real mode with 32-bit registers, loaded at 0x7c00.

        .equ    BYTES,  1024
        .equ    RESULT, 0x4f0

        .code16
        .globl  _start
_start: ljmp    $0, $1f
1:      xorw    %ax, %ax
        movw    %ax, %ds
        movw    $0x1000, %ax
        movw    %ax, %es
        cld

        xorw    %di, %di                # x = x * 1103515245 + 12345; a byte is its bits 16 to 23
        movl    $1, %ebx
        movw    $BYTES, %cx
2:      imull   $1103515245, %ebx, %ebx
        addl    $12345, %ebx
        movl    %ebx, %eax
        shrl    $16, %eax
        stosb
        loop    2b

        xorw    %di, %di
        movl    $0xffffffff, %eax       # EAX is the register of the CRC
        movw    $BYTES, %cx
3:      xorb    %es:(%di), %al
        movw    $8, %bx
4:      shrl    $1, %eax
        jnc     5f
        xorl    $0xedb88320, %eax
5:      decw    %bx
        jnz     4b
        incw    %di
        loop    3b
        notl    %eax
        movl    %eax, %ebx

        movw    $text, %si
        movw    $0x3f8, %dx
6:      lodsb
        testb   %al, %al
        jz      7f
        outb    %al, %dx
        jmp     6b

7:      movl    %ebx, %eax
        movw    $RESULT, %dx
        outl    %eax, %dx
8:      cli
        hlt
        jmp     8b

text:   .asciz  "crc of 1024 bytes reported\n"
