# Firmware of 64 KiB for the small guests of this folder: fills PAGES pages from 1 MiB on, each with its own number, and
# then adds one to the first word of every second one, for ever.

        .set    BASE, 1 << 20
        .set    PAGES, 48
        .set    PAGE, 4096

image:                                          # linked to the last 64 KiB below 4 GiB
        .org    0xff00
        .code16
start:
        cli
        cld
        lgdtl   %cs:gdt_register - image
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $8, $1f

        .code32
1:      mov     $16, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     $BASE, %edi
        mov     $1, %eax
2:      mov     $PAGE / 4, %ecx
        rep     stosl
        inc     %eax
        cmp     $PAGES, %eax
        jbe     2b
3:      mov     $BASE, %edi
4:      incl    (%edi)
        add     $2 * PAGE, %edi
        cmp     $BASE + PAGES * PAGE, %edi
        jb      4b
        mov     %cr0, %eax                      # forget what is known to be dirty, else TCG before 9.0 marks no page twice
        xor     $1 << 16, %eax
        mov     %eax, %cr0
        jmp     3b

        .align  8
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff     # marked as used already: they are in a ROM
gdt_register:
        .word   gdt_register - gdt - 1
        .long   gdt

        .org    0xfff0
        .code16
        jmp     start
        .org    0x10000
