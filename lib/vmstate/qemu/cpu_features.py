"""Names of the features of an x86 CPU, as QEMU has them in `-cpu`, by CPUID leaf, register and bit."""

# One name for each bit from 0 on; '-' for none.
_NAMES = {
    "00000001 EDX": "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi "
    "mmx fxsr sse sse2 ss ht tm ia64 pbe",
    "00000001 ECX": "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - pcid dca "
    "sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor",
    "00000006 EAX": "- - arat",
    "00000007.0 EBX": "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm - zero-fcs-fds "
    "mpx - avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel-pt avx512pf avx512er avx512cd "
    "sha-ni avx512bw avx512vl",
    "00000007.0 ECX": "- avx512vbmi umip pku - waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg - "
    "avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks",
    "00000007.0 EDX": "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize - "
    "tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d arch-capabilities "
    "core-capability ssbd",
    "00000007.1 EAX": "- - - - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc",
    "00000007.2 EDX": "intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no",
    "0000000D.1 EAX": "xsaveopt xsavec xgetbv1 xsaves xfd",
    "40000001 EAX": "kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time kvm-pv-eoi kvm-pv-unhalt - "
    "kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control kvm-pv-sched-yield kvm-asyncpf-int "
    "kvm-msi-ext-dest-id - - - - - - - - kvmclock-stable-bit",
    "80000001 EDX": "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm "
    "3dnowext 3dnow",
    "80000001 ECX": "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit "
    "wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb",
    "80000007 EDX": "- - - - - - - - invtsc",
    "80000008 EBX": "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp - - - - - - - - amd-ssbd "
    "virt-ssbd amd-no-ssb",
    "8000000A EDX": "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists - - pause-filter - "
    "pfthreshold avic - v-vmsave-vmload vgif - - - - - - - - - - - svme-addr-chk",
}
NAMES = {leaf: names.split() for leaf, names in _NAMES.items()}
# Versions of QEMU differ on whether `ht` and `cmp-legacy` are set by -smp; leaf 1 stands in 80000001 once more; what
# XSAVE can save follows from other features.
_LEFT_OUT = {
    "00000001 EDX": 1 << 28,
    "80000001 ECX": 1 << 1,
    "80000001 EDX": 0x0183F3FF,
    "0000000D.0 EAX": ~0,
    "0000000D.0 EDX": ~0,
}


def lacking(want: dict[str, int], have: dict[str, int]) -> list[str]:
    """Names of the features of `want` that `have` is without."""
    found = []
    for word, bits in sorted(want.items()):
        left = bits & ~have.get(word, 0) & ~_LEFT_OUT.get(word, 0)
        found += [_name(word, bit) for bit in range(32) if left >> bit & 1]
    return list(dict.fromkeys(found))


def _name(word: str, bit: int) -> str:
    known = NAMES.get(word, [])
    return known[bit] if bit < len(known) and known[bit] != "-" else f"CPUID {word} bit {bit}"


def has(words: dict[str, int], name: str) -> bool:
    return any(
        words.get(word, 0) >> bit & 1 for word, names in NAMES.items() for bit, n in enumerate(names) if n == name
    )
