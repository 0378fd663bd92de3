# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# The guest program that proves an accelerator. QEMU runs it in place of the
# firmware (-bios), so it begins at the reset vector in real mode, and it does
# what an operating system does in its first second:
#
#   r  real mode, a stack in RAM
#   p  protected mode
#   l  long mode with paging (2 MiB pages)
#   w  about 50 million instructions of kernel code
#   c  CPUID
#   m  RDMSR and WRMSR: APIC base, PAT, GS base with SWAPGS
#   f  a page fault in kernel mode, mapped by its handler
#   t  sixteen timer interrupts (PIT, PIC, local APIC), waited for with HLT
#   u  user mode by IRETQ and back by SYSCALL
#   v  the work of w once more
#
# It writes each letter to the debug port 0x402 when the step is done, then
# "OK", and ends QEMU through isa-debug-exit (port 0xf4) with 0x2a. The work
# tells real hardware (10 to 50 ms) from a KVM that emulates guest kernel code
# instruction by instruction (minutes). It is done twice because such a KVM may
# run kernel code directly as soon as the guest has once been in user mode,
# which hides how slow it is before that: Linux unpacks itself in that state.
#
# Build (binutils): as --64 -o p.o probe.asm && ld -m elf_x86_64 -Ttext=0xf0000
#   --oformat binary -e 0 -o probe.bin p.o
# image.go pads the result to 64 KiB and adds the reset vector.

        .set    DEBUG, 0x402
        .set    EXIT,  0xf4
        .set    PML4,  0x10000          # page tables, all in low RAM
        .set    PDPT,  0x11000
        .set    PD,    0x12000
        .set    PT,    0x13000          # 4 KiB pages of 0x400000-0x5fffff
        .set    IDT,   0x14000
        .set    TICKS, 0x15000
        .set    TSS,   0x15100
        .set    PDHI,  0x16000          # maps the local APIC
        .set    APIC,  0xfee00000
        .set    STACK, 0x20000
        .set    USER,  0x200000         # where the user code is copied to
        .set    FAULT, 0x404000         # not mapped until it is touched

        .macro  say c
        mov     $\c, %al
        mov     $DEBUG, %dx
        out     %al, %dx
        .endm

        .text
        .code16
real:
        cli
        cld
        xor     %ax, %ax
        mov     %ax, %ss
        mov     $0x7000, %sp
        push    %cs                     # the stack must be RAM that keeps a value
        pop     %bx
        mov     %cs, %ax
        cmp     %ax, %bx
        jne     dead16
        say     'r'
        mov     %cs, %ax
        mov     %ax, %ds
        lgdtl   (gdtr - real)
        mov     %cr0, %eax
        or      $1, %eax
        mov     %eax, %cr0
        ljmpl   $0x08, $prot
dead16: hlt
        jmp     dead16

        .code32
prot:
        mov     $0x10, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $STACK, %esp
        say     'p'
        mov     $PML4, %edi             # clear tables, IDT, counter and TSS
        xor     %eax, %eax
        mov     $0x1c00, %ecx
        rep stosl
        movl    $(PDPT + 7), PML4       # present, writable, user
        movl    $(PD + 7), PDPT
        mov     $PD, %edi               # identity map of 1 GiB
        mov     $0x87, %eax
        mov     $512, %ecx
1:      mov     %eax, (%edi)
        add     $8, %edi
        add     $0x200000, %eax
        loop    1b
        movl    $(PT + 7), PD + 16      # 0x400000: 4 KiB pages, none present
        movl    $(PDHI + 7), PDPT + 24
        movl    $(APIC + 0x93), PDHI + 0x1f7 * 8
        mov     %cr4, %eax
        or      $0x620, %eax            # PAE, OSFXSR, OSXMMEXCPT
        mov     %eax, %cr4
        mov     $PML4, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx       # EFER: LME and SCE
        rdmsr
        or      $0x101, %eax
        wrmsr
        mov     %cr0, %eax
        or      $0x80010000, %eax       # PG, WP
        mov     %eax, %cr0
        ljmpl   $0x18, $long

        .code64
long:
        mov     $0x20, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $STACK, %rsp
        say     'l'

        call    load
        say     'w'
        mov     $0x80000001, %eax       # CPUID must report long mode
        cpuid
        bt      $29, %edx
        jnc     dead
        xor     %eax, %eax
        cpuid
        test    %ebx, %ebx              # and name a vendor
        jz      dead
        say     'c'

        mov     $0x1b, %ecx             # APIC base: read and write back
        rdmsr
        wrmsr
        mov     $0x277, %ecx            # PAT: read and write back
        rdmsr
        wrmsr
        mov     $0xc0000101, %ecx       # GS base, through SWAPGS
        mov     $0x5a5a0, %eax
        xor     %edx, %edx
        wrmsr
        swapgs
        mov     $0xc0000102, %ecx       # KernelGSbase must hold it now
        rdmsr
        cmp     $0x5a5a0, %eax
        jne     dead
        swapgs
        say     'm'

        mov     $(fault - real + 0xf0000), %eax
        mov     $14, %ecx
        call    gate
        mov     $(tick - real + 0xf0000), %eax
        mov     $0x20, %ecx
        call    gate
        lidt    idtr
        movl    $0x12345678, FAULT      # faults; the handler maps the page
        cmpl    $0x12345678, FAULT
        jne     dead
        cmpl    $1, TICKS + 8           # exactly one fault
        jne     dead
        say     'f'

        mov     $APIC, %ebx             # local APIC on, PIC through its LINT0
        movl    $0x1ff, 0xf0(%rbx)
        movl    $0x700, 0x350(%rbx)
        mov     $0x11, %al              # PIC: vectors 0x20, only IRQ 0 open
        out     %al, $0x20
        out     %al, $0xa0
        mov     $0x20, %al
        out     %al, $0x21
        mov     $0x28, %al
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
        mov     $0x34, %al              # PIT channel 0: every 2 ms
        out     %al, $0x43
        mov     $0x52, %al
        out     %al, $0x40
        mov     $0x09, %al
        out     %al, $0x40
1:      sti
        hlt
        cli
        cmpl    $16, TICKS
        jb      1b
        mov     $0xff, %al
        out     %al, $0x21
        say     't'

        mov     $(user - real + 0xf0000), %esi
        mov     $USER, %edi
        mov     $(user_end - user), %ecx
        rep movsb
        mov     $0xc0000081, %ecx       # STAR: kernel 0x18/0x20, user 0x2b/0x33
        xor     %eax, %eax
        mov     $0x00230018, %edx
        wrmsr
        mov     $0xc0000082, %ecx       # LSTAR
        mov     $(back - real + 0xf0000), %eax
        xor     %edx, %edx
        wrmsr
        mov     $0xc0000084, %ecx       # SFMASK: interrupts off
        mov     $0x200, %eax
        wrmsr
        xor     %ebx, %ebx
        pushq   $0x2b                   # user SS, RSP, RFLAGS, CS, RIP
        pushq   $(USER + 0x1000)
        pushq   $2
        pushq   $0x33
        pushq   $USER
        iretq
back:
        mov     $STACK, %rsp
        cmp     $0x77, %ebx
        jne     dead
        say     'u'

        call    load
        say     'v'
        say     'O'
        say     'K'
        mov     $0x2a, %al
        mov     $EXIT, %dx
        out     %al, %dx
dead:   hlt
        jmp     dead

load:   mov     $6000000, %ecx
1:      mov     %rcx, STACK - 4096
        add     STACK - 4096, %rax
        call    work
        dec     %ecx
        jnz     1b
        ret

work:   imul    $31, %rax, %rax
        rol     $7, %rax
        xor     %rcx, %rax
        ret

user:   mov     $0x77, %ebx             # runs as a copy at USER
        syscall
user_end:

# gate makes IDT entry ecx an interrupt gate to eax (below 4 GiB).
gate:   shl     $4, %ecx
        mov     %ax, IDT(%rcx)
        movw    $0x18, IDT + 2(%rcx)
        movw    $0x8e00, IDT + 4(%rcx)
        shr     $16, %eax
        mov     %ax, IDT + 6(%rcx)
        ret

# fault maps the page of FAULT to physical 0x600000 and counts.
fault:  movl    $(0x600000 + 7), PT + 4 * 8
        incl    TICKS + 8
        add     $8, %rsp                # error code
        iretq

tick:   push    %rax
        incl    TICKS
        mov     $0x20, %al
        out     %al, $0x20
        pop     %rax
        iretq

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # 08 code, 32 bit
        .quad   0x00cf93000000ffff      # 10 data
        .quad   0x00af9b000000ffff      # 18 code, 64 bit
        .quad   0x00cf93000000ffff      # 20 data
        .quad   0x00cff3000000ffff      # 28 user data
        .quad   0x00affb000000ffff      # 30 user code, 64 bit
gdtr:   .word   gdtr - gdt - 1
        .long   gdt - real + 0xf0000
idtr:   .word   0x3ff
        .quad   IDT
