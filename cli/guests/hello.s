# Prints a line on the first serial port and halts: the least that a guest can do.
# Real mode, loaded at 0x7c00.

        .code16
        .globl  _start
_start: ljmp    $0, $1f                 # CS = 0, whatever it was
1:      xorw    %ax, %ax
        movw    %ax, %ds
        movw    $text, %si
        movw    $0x3f8, %dx             # COM1, transmit register
        cld
2:      lodsb
        testb   %al, %al
        jz      3f
        outb    %al, %dx
        jmp     2b
3:      cli
        hlt                             # nothing can wake it
        jmp     3b

text:   .asciz  "hello from a guest\n"
