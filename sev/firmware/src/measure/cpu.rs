//! CPUID signatures of QEMU's EPYC models.
//!
//! The signature is the value of CPUID leaf 1 EAX. QEMU puts it into RDX at reset, and so into
//! the measured VMSA; the models and their numbers are those of QEMU's `target/i386/cpu.c`.

/// Packs family, model and stepping as CPUID leaf 1 EAX does (CPUID Fn0000_0001_EAX).
pub const fn signature_of(family: u32, model: u32, stepping: u32) -> u32 {
    let (base, extended) = if family > 0xf {
        (0xf, (family - 0xf) & 0xff)
    } else {
        (family, 0)
    };
    extended << 20 | (model >> 4 & 0xf) << 16 | base << 8 | (model & 0xf) << 4 | (stepping & 0xf)
}

const NAPLES: u32 = signature_of(23, 1, 2);
const ROME: u32 = signature_of(23, 49, 0);
const MILAN: u32 = signature_of(25, 1, 1);
const GENOA: u32 = signature_of(25, 17, 0);
const TURIN: u32 = signature_of(26, 0, 0);

const TYPES: &[(&str, u32)] = &[
    ("EPYC", NAPLES),
    ("EPYC-v1", NAPLES),
    ("EPYC-v2", NAPLES),
    ("EPYC-IBPB", NAPLES),
    ("EPYC-v3", NAPLES),
    ("EPYC-v4", NAPLES),
    ("EPYC-v5", NAPLES),
    ("EPYC-Rome", ROME),
    ("EPYC-Rome-v1", ROME),
    ("EPYC-Rome-v2", ROME),
    ("EPYC-Rome-v3", ROME),
    ("EPYC-Rome-v4", ROME),
    ("EPYC-Rome-v5", ROME),
    ("EPYC-Milan", MILAN),
    ("EPYC-Milan-v1", MILAN),
    ("EPYC-Milan-v2", MILAN),
    ("EPYC-Milan-v3", MILAN),
    ("EPYC-Genoa", GENOA),
    ("EPYC-Genoa-v1", GENOA),
    ("EPYC-Genoa-v2", GENOA),
    ("EPYC-Turin", TURIN),
    ("EPYC-Turin-v1", TURIN),
];

/// The signature of a QEMU CPU model, or `None` for a name that is not an EPYC model.
pub fn cpu_signature(name: &str) -> Option<u32> {
    cpu_types().find(|(n, _)| *n == name).map(|(_, sig)| sig)
}

/// Every known model with its signature.
pub fn cpu_types() -> impl Iterator<Item = (&'static str, u32)> {
    TYPES.iter().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_pack_low_and_extended_families() {
        assert_eq!(signature_of(14, 1, 2), 0xe12);
        assert_eq!(cpu_signature("EPYC-v4"), Some(0x80_0f12));
        assert_eq!(cpu_signature("EPYC-Rome"), Some(0x83_0f10));
        assert_eq!(cpu_signature("EPYC-Milan"), Some(0xa0_0f11));
        assert_eq!(cpu_signature("EPYC-Genoa"), Some(0xa1_0f10));
        assert_eq!(cpu_signature("EPYC-Turin"), Some(0xb0_0f00));
        assert_eq!(cpu_signature("Opteron_G1"), None);
    }
}
