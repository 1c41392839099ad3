//! The CPUID page of an SNP guest (SEV-SNP firmware ABI, "CPUID page"): what its vCPUs answer, as the firmware vouches for it.

use kvm_ops::{Error, Field, PAGE_SIZE, Result, VcpuOps};

use super::measured::Contents;

/// Header and entries: a count, and 48 bytes for each answer.
const HEADER: usize = 16;
const ENTRY: usize = 48;
const MOST: usize = 64;

/// The ranges of functions; the first function of each tells the last.
const RANGES: [u32; 3] = [0, 0x4000_0000, 0x8000_0000];
/// The most functions of a range that are asked for, whatever its first one tells.
const RANGE: u32 = 0x100;
/// The states of the extended registers, and the size of the area of those that are always there.
const STATES: u32 = 0xd;
const LEGACY_AREA: u32 = 0x240;
const COMPONENTS: u32 = 63;

/// The page for a vCPU's answers. Those that are all zeros are left out: what the page lacks is zeros for a guest.
pub(crate) fn page<V: VcpuOps>(vcpu: &V) -> Result<Contents> {
    let mut entries = Vec::new();
    for first in RANGES {
        let [last, ..] = vcpu.cpuid_leaf(first, 0)?;
        for leaf in first..=last.min(first + RANGE) {
            add(&mut entries, vcpu, leaf)?;
        }
    }
    if entries.len() > MOST {
        return Err(Error::Invalid(Field::BufferLength, entries.len() as u64));
    }
    let mut page = Box::new([0; PAGE_SIZE as usize]);
    page[..4].copy_from_slice(&(entries.len() as u32).to_le_bytes());
    for (entry, to) in entries.iter().zip(page[HEADER..].chunks_exact_mut(ENTRY)) {
        to.copy_from_slice(entry);
    }
    Ok(page)
}

/// Adds the answers of a function, one for each subfunction that it has.
fn add<V: VcpuOps>(entries: &mut Vec<[u8; ENTRY]>, vcpu: &V, leaf: u32) -> Result<()> {
    let last = last_subleaf(leaf, vcpu.cpuid_leaf(leaf, 0)?);
    for subleaf in 0..=last {
        let regs = vcpu.cpuid_leaf(leaf, subleaf)?;
        if regs != [0; 4] {
            entries.push(entry(leaf, subleaf, regs));
        }
        if ends_list(leaf, regs) {
            break;
        }
    }
    Ok(())
}

/// The last subfunction that a function can have (SDM vol. 2, CPUID; APM vol. 3, appendix E).
const fn last_subleaf(leaf: u32, [eax, ..]: [u32; 4]) -> u32 {
    const LISTED: u32 = 15;
    match leaf {
        // The number of the last one is in EAX.
        7 | 0x14 => {
            if eax < LISTED {
                eax
            } else {
                LISTED
            }
        }
        STATES => COMPONENTS,
        4 | 0xb | 0xf | 0x10 | 0x1f | 0x8000_001d => LISTED,
        _ => 0,
    }
}

/// True if a list of caches or levels of topology ends with this answer.
const fn ends_list(leaf: u32, [eax, _, ecx, _]: [u32; 4]) -> bool {
    match leaf {
        4 | 0x8000_001d => eax & 0x1f == 0,
        0xb | 0x1f => ecx >> 8 & 0xff == 0,
        _ => false,
    }
}

/// EAX and ECX of the question, XCR0 and XSS with which it is asked, the answer, and 8 bytes of zeros.
fn entry(leaf: u32, subleaf: u32, [eax, mut ebx, ecx, edx]: [u32; 4]) -> [u8; ENTRY] {
    let mut xcr0 = 0_u64;
    if leaf == STATES && subleaf < 2 {
        // The size for the states of every processor, from which a guest computes that of its own.
        (xcr0, ebx) = (1, LEGACY_AREA);
    }
    let mut entry = [0; ENTRY];
    let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, [leaf, subleaf].map(u32::to_le_bytes).as_flattened());
    put(8, &xcr0.to_le_bytes());
    put(
        24,
        [eax, ebx, ecx, edx].map(u32::to_le_bytes).as_flattened(),
    );
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    use kvm_ops::sim::SimHost;
    use kvm_ops::{Kind, Tech, VcpuId, Vendor, VmConfig, create};

    /// Function, subfunction, XCR0 and answer of each entry.
    fn entries(page: &[u8]) -> Vec<(u32, u32, u64, [u32; 4])> {
        let word =
            |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let all = page[HEADER..]
            .chunks_exact(ENTRY)
            .take(word(page, 0) as usize);
        let entry = |bytes: &[u8]| {
            let answer = [24, 28, 32, 36].map(|at| word(bytes, at));
            let [leaf, subleaf, xcr0] = [0, 4, 8].map(|at| word(bytes, at));
            assert_eq!(bytes[40..], [0; 8]);
            (leaf, subleaf, xcr0.into(), answer)
        };
        all.map(entry).collect()
    }

    #[test]
    fn the_page_has_each_answer_of_the_processor_once() {
        let host = SimHost::new(Vendor::Amd);
        let vm = create(&host, &VmConfig::new(Kind::Of(Tech::SevSnp))).unwrap();
        let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        let page = page(&vcpu).unwrap();
        let entries = entries(&page[..]);
        for (leaf, subleaf, xcr0, answer) in entries.iter().copied() {
            let told = vcpu.cpuid_leaf(leaf, subleaf).unwrap();
            assert_eq!((xcr0, answer), (0, told), "{leaf:#x}.{subleaf}");
        }
        let mut places: Vec<_> = entries.iter().map(|entry| (entry.0, entry.1)).collect();
        // What firmware and kernel cannot do without: the vendor, features, and encryption.
        for needed in [(0, 0), (1, 0), (7, 0), (0x8000_001f, 0)] {
            assert!(places.contains(&needed), "{needed:#x?}");
        }
        places.dedup();
        assert_eq!(places.len(), entries.len());
    }

    #[test]
    fn the_size_of_the_extended_registers_is_that_of_those_which_every_processor_has() {
        for subleaf in 0..3 {
            let mut page = [0; HEADER + ENTRY];
            page[0] = 1;
            page[HEADER..].copy_from_slice(&entry(STATES, subleaf, [7, 832, 832, 1]));
            let (xcr0, size) = if subleaf < 2 {
                (1, LEGACY_AREA)
            } else {
                (0, 832)
            };
            assert_eq!(entries(&page), [(STATES, subleaf, xcr0, [7, size, 832, 1])]);
        }
    }

    #[test]
    fn lists_have_an_end() {
        assert_eq!(last_subleaf(7, [1, 0, 0, 0]), 1);
        assert_eq!(last_subleaf(7, [u32::MAX, 0, 0, 0]), 15);
        assert_eq!((last_subleaf(4, [0; 4]), last_subleaf(2, [1; 4])), (15, 0));
        assert!(ends_list(4, [0x20, 1, 1, 1]) && !ends_list(4, [0x21, 1, 1, 1]));
        assert!(ends_list(0xb, [1, 1, 2, 1]) && !ends_list(0xb, [1, 1, 0x102, 1]));
    }
}
