# Two vCPUs pass a turn to and fro 16 times, each counting, and vCPU 0 reports the count. Loaded at
# 0x7c00 in real mode; vCPU 0 switches to protected mode to reach its local APIC at 0xfee00000, and
# starts vCPU 1 with INIT and SIPI as firmware does (SDM vol. 3, 9.4). It ends the machine through
# the debug-exit port: HLT would wait for an interrupt in the platform.

        .equ    ICR_LOW,  0xfee00300
        .equ    ICR_HIGH, 0xfee00310
        .equ    SVR,      0xfee000f0
        .equ    TURN,     0x9000        # whose turn it is: 0 or 1
        .equ    COUNT,    0x9004
        .equ    ROUNDS,   16
        .equ    RESULT,   0x4f0
        .equ    EXIT,     0xf4

        .code16
        .globl  _start
_start: ljmp    $0, $1f
1:      cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movl    $0, TURN
        movl    $0, COUNT
        lgdtl   gdtr
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $8, $flat

        .code32
flat:   movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        cld

        movl    $0x1ff, SVR             # switch the local APIC on
        movl    $0x01000000, ICR_HIGH   # to APIC id 1
        movl    $0x00004500, ICR_LOW    # INIT
        call    idle
        movl    $0x01000000, ICR_HIGH
        movl    $0x00004608, ICR_LOW    # SIPI, start at page 8
        call    idle

        movl    $ROUNDS, %ecx
2:      incl    COUNT
        movl    $1, TURN
3:      pause
        cmpl    $0, TURN
        jne     3b
        loop    2b

        movl    $text, %esi
        movw    $0x3f8, %dx
4:      lodsb
        testb   %al, %al
        jz      5f
        outb    %al, %dx
        jmp     4b

5:      movl    COUNT, %eax
        movw    $RESULT, %dx
        outl    %eax, %dx
        xorl    %eax, %eax
        outl    %eax, $EXIT
6:      hlt
        jmp     6b

idle:   pause                           # until the APIC has sent it
        testl   $0x1000, ICR_LOW
        jnz     idle
        ret

text:   .asciz  "two vCPUs took 16 turns each\n"

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff
        .quad   0x00cf93000000ffff
gdtr:   .word   . - gdt - 1
        .long   gdt

        .org    0x8000 - 0x7c00         # page 8: vCPU 1 starts here, in real mode, CS = 0x800
        .code16
second: xorw    %ax, %ax
        movw    %ax, %ds
        movw    $ROUNDS, %cx
7:      pause
        cmpl    $1, TURN
        jne     7b
        incl    COUNT
        movl    $0, TURN
        loop    7b
8:      cli
        hlt
        jmp     8b
