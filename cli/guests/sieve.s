# Counts the primes below 8192 with the sieve of Eratosthenes, prints the number and reports it
# through the result port. Real mode, loaded at 0x7c00; the flags lie at 0x10000.

        .equ    LIMIT,  8192
        .equ    RESULT, 0x4f0

        .code16
        .globl  _start
_start: ljmp    $0, $1f
1:      xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp
        movw    $0x1000, %ax
        movw    %ax, %es
        cld

        xorw    %di, %di                # all flags 0: may be prime
        xorw    %ax, %ax
        movw    $LIMIT / 2, %cx
        rep stosw

        xorl    %ebp, %ebp              # EBP counts
        movw    $2, %bx                 # BX is the candidate
next:   cmpb    $0, %es:(%bx)
        jne     skip
        incl    %ebp
        movw    %bx, %di                # strike its multiples, from its double on
strike: addw    %bx, %di
        cmpw    $LIMIT, %di
        jae     skip
        movb    $1, %es:(%di)
        jmp     strike
skip:   incw    %bx
        cmpw    $LIMIT, %bx
        jb      next

        movw    $text, %si
        movw    $0x3f8, %dx
3:      lodsb
        testb   %al, %al
        jz      4f
        outb    %al, %dx
        jmp     3b

4:      movl    %ebp, %eax              # decimal digits, last first, onto the stack
        movl    $10, %ebx
        xorw    %cx, %cx
5:      xorl    %edx, %edx
        divl    %ebx
        pushw   %dx
        incw    %cx
        testl   %eax, %eax
        jnz     5b
        movw    $0x3f8, %dx
6:      popw    %ax
        addb    $'0', %al
        outb    %al, %dx
        loop    6b
        movb    $'\n', %al
        outb    %al, %dx

        movl    %ebp, %eax
        movw    $RESULT, %dx
        outl    %eax, %dx
7:      cli
        hlt
        jmp     7b

text:   .asciz  "primes below 8192: "
