# A guest without an OS, started by `qemu -kernel metal.elf` (multiboot): fills its RAM from 16 MiB to the end of what lies
# below 4 GiB, prints `ready` on COM1 and then `count N` 20 times a second. `-append dirty=N`: each count writes to N pages.
# All of the RAM lies there up to -m 2815 on q35 and -m 3583 on pc; of more, only 2 GiB and 3 GiB.

        .set    COM1, 0x3f8
        .set    FILL, 16 << 20
        .set    MAP_IS_GIVEN, 1 << 6
        .set    CMDLINE_IS_GIVEN, 1 << 2
        .set    CODE, 8
        .set    DATA, 16
        .set    TIMER, 0x20
        .set    HZ, 20
        .set    WORD, 4
        .set    CHUNK, 4 << 20
        .set    DMA_READ, 2
        .set    DMA_SKIP, 4
        .set    DMA_SELECT, 0x11 << 16 | 8      # 0x11 is what was given with -kernel

        .text
        .align  4
start_of_file:
        .long   0x1badb002, 3, -(0x1badb002 + 3)

        .globl  start
start:
        cld
        cli
        lgdt    gdt_register
        ljmp    $CODE, $1f
1:      mov     $DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $stack, %esp
        mov     %ebx, %ebp                      # the boot information, for all that follows
        call    find_end
        call    find_dirty
        call    fill
        call    start_timer
        mov     $ready, %esi
        call    print

count:
        incl    counter
        mov     $count_text, %esi
        call    print
        mov     counter, %eax
        call    print_number
        mov     $newline, %esi
        call    print
        call    touch
        sti                                     # lets nothing in before the hlt has begun: no tick is lost between
1:      hlt                                     # until timer_handler
        jmp     1b

# end = the end of the usable range that holds FILL
find_end:
        testl   $MAP_IS_GIVEN, (%ebp)
        jz      broken
        mov     48(%ebp), %esi                  # address and length of the memory map
        mov     44(%ebp), %ecx
        add     %esi, %ecx
1:      cmp     %ecx, %esi
        jae     broken
        cmpl    $1, 20(%esi)                    # usable
        jne     2f
        cmpl    $0, 8(%esi)                     # below 4 GiB
        jne     2f
        mov     4(%esi), %eax
        cmp     $FILL, %eax
        ja      2f
        add     12(%esi), %eax
        cmp     $FILL, %eax
        jbe     2f
        and     $~4095, %eax
        mov     %eax, end
        ret
2:      add     (%esi), %esi
        add     $4, %esi
        jmp     1b

broken:
        mov     $broken_text, %esi
        call    print
1:      cli
        hlt
        jmp     1b

# dirty = N of the word dirty=N, 16 of the word dirty, else 0
find_dirty:
        testl   $CMDLINE_IS_GIVEN, (%ebp)
        jz      3f
        mov     16(%ebp), %esi
1:      cmpb    $0, (%esi)
        je      3f
        cmpl    $0x74726964, (%esi)             # "dirt", then "y"
        jne     2f
        cmpb    $'y', 4(%esi)
        je      4f
2:      inc     %esi
        jmp     1b
3:      ret
4:      movl    $16, dirty
        cmpb    $'=', 5(%esi)
        jne     3b
        add     $6, %esi
        xor     %eax, %eax
5:      movzbl  (%esi), %ecx
        sub     $'0', %ecx
        cmp     $9, %ecx
        ja      6f
        imul    $10, %eax
        add     %ecx, %eax
        inc     %esi
        jmp     5b
6:      mov     %eax, dirty
        ret

# QEMU copies our own random data over the RAM, CHUNK by CHUNK, each time from a WORD further on: so no two pages are alike,
# and it is quick even where KVM has to emulate each instruction.
fill:
        mov     $FILL, %edi
        mov     $data - start_of_file, %ebx     # how far into the file
1:      mov     $DMA_SELECT | DMA_SKIP, %eax
        mov     %ebx, %ecx
        call    dma
        mov     end, %ecx
        sub     %edi, %ecx
        cmp     $CHUNK, %ecx
        jb      2f
        mov     $CHUNK, %ecx
2:      mov     $DMA_READ, %eax
        call    dma
        add     %ecx, %edi
        add     $WORD, %ebx
        cmp     end, %edi
        jb      1b
        ret

# Have the firmware device do command eax with ecx bytes at edi.
dma:
        bswap   %eax
        mov     %eax, dma_command
        mov     %ecx, %eax
        bswap   %eax
        mov     %eax, dma_command + 4
        mov     %edi, %eax
        bswap   %eax
        mov     %eax, dma_command + 12
        mov     $dma_command, %eax
        bswap   %eax
        mov     $0x518, %edx                    # the upper half, at 0x514, is zero
        out     %eax, %dx
3:      mov     dma_command, %eax
        test    %eax, %eax
        jz      4f
        cmp     $0x01000000, %eax               # refused
        je      broken
        jmp     3b
4:      ret

# Add one to a word of as many random pages as `dirty` says.
touch:
        mov     dirty, %ecx
        jecxz   2f
1:      imull   $1664525, random, %eax
        add     $1013904223, %eax
        mov     %eax, random
        mov     end, %edx
        sub     $FILL, %edx
        mul     %edx                            # edx = random part of the range
        and     $~4095, %edx
        incl    FILL(%edx)
        loop    1b
2:      ret

start_timer:
        mov     $timer_handler, %eax
        mov     %ax, timer_gate
        shr     $16, %eax
        mov     %ax, timer_gate + 6
        lidt    idt_register
        mov     $0x11, %al                      # both interrupt controllers: vectors from TIMER on, only the timer let in
        out     %al, $0x20
        out     %al, $0xa0
        mov     $TIMER, %al
        out     %al, $0x21
        mov     $TIMER + 8, %al
        out     %al, $0xa1
        mov     $4, %al
        out     %al, $0x21
        mov     $2, %al
        out     %al, $0xa1
        mov     $1, %al
        out     %al, $0x21
        out     %al, $0xa1
        mov     $0xfe, %al
        out     %al, $0x21
        mov     $0xff, %al
        out     %al, $0xa1
        mov     $0x34, %al                      # channel 0, a tick each time it has counted down
        out     %al, $0x43
        mov     $1193182 / HZ, %eax
        out     %al, $0x40
        mov     %ah, %al
        out     %al, $0x40
        ret

# Always comes in the hlt, so it need not go back there by an iret, which a KVM that emulates does not know.
timer_handler:
        add     $12, %esp
        mov     $0x20, %al
        out     %al, $0x20
        jmp     count

# Print the text at esi.
print:
        lodsb
        test    %al, %al
        jz      1f
        call    put
        jmp     print
1:      ret

# Print eax in decimal.
print_number:
        mov     $number_end, %esi
        mov     $10, %ecx
1:      xor     %edx, %edx
        div     %ecx
        add     $'0', %dl
        dec     %esi
        mov     %dl, (%esi)
        test    %eax, %eax
        jnz     1b
        jmp     print

# Print the character in al.
put:
        mov     %al, %ah
        mov     $COM1 + 5, %dx
1:      in      %dx, %al
        test    $0x20, %al
        jz      1b
        mov     %ah, %al
        mov     $COM1, %dx
        out     %al, %dx
        ret

        .data
        .align  8
gdt:    .quad   0, 0x00cf9a000000ffff, 0x00cf92000000ffff
idt:    .fill   TIMER, 8, 0
timer_gate:
        .word   0, CODE, 0x8e00, 0
gdt_register:
        .word   idt - gdt - 1
        .long   gdt
idt_register:
        .word   gdt_register - idt - 1
        .long   idt

counter:        .long   0
dirty:          .long   0
end:            .long   0
random:         .long   1
dma_command:    .fill   4, 4, 0
number:         .fill   10, 1, 0
number_end:     .byte   0
ready:          .asciz  "ready\n"
count_text:     .asciz  "count "
newline:        .asciz  "\n"
broken_text:    .asciz  "no memory\n"

# One CHUNK, and room for all of its starts.
        .align  4096
data:   .set    value, 1
        .rept   (CHUNK + 4096) / WORD
        .set    value, (value * 1664525 + 1013904223) & 0xffffffff
        .long   value
        .endr

        .bss
        .align  16
        .skip   4096
stack:
