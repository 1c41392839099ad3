# Prints a line and jumps to itself: a guest that has to be stopped. Real mode, loaded at 0x7c00.

        .code16
        .globl  _start
_start: ljmp    $0, $1f
1:      xorw    %ax, %ax
        movw    %ax, %ds
        movw    $text, %si
        movw    $0x3f8, %dx
        cld
2:      lodsb
        testb   %al, %al
        jz      3f
        outb    %al, %dx
        jmp     2b
3:      jmp     3b

text:   .asciz  "until it is stopped\n"
