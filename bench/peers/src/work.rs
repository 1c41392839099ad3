//! The number of bytes to hash for a digest. The speed of its hash limits every program.

use kvm_ops_tdvf::Tdvf;
use soft_amd_sp::measure::{Ovmf, SectionKind};

use crate::{Technology, VCPUS};

const PAGE: u64 = 4096;
/// The size of PAGE_INFO, which an SNP launch hashes for each page.
const PAGE_INFO: u64 = 0x70;
/// The bytes that TDH.MEM.PAGE.ADD adds to MRTD, and those that TDH.MR.EXTEND adds per 256 bytes.
const PAGE_ADD: u64 = 128;
const EXTEND: u64 = 128 + 256;

/// The length of a hashed message after padding to whole blocks.
fn padded(length: u64, block: u64) -> u64 {
    // The padding: one bit, and the length in an eighth of a block.
    (length + 1 + block / 8).next_multiple_of(block)
}

/// The number of bytes to hash for a digest of this image, padding included.
pub(crate) fn bytes(technology: Technology, image: &[u8]) -> u64 {
    let length = image.len() as u64;
    let vcpus = u64::from(VCPUS);
    match technology {
        Technology::Sev => padded(length, 64),
        Technology::SevEs => padded(length + vcpus * PAGE, 64),
        Technology::Snp => {
            let ovmf = Ovmf::parse(image).unwrap_or_default();
            let empty = ovmf.sections().iter().map(|section| match section.kind {
                SectionKind::Secrets | SectionKind::Cpuid => 1,
                _ => u64::from(section.size) / PAGE,
            });
            let measured = length / PAGE + vcpus;
            let records = measured + empty.sum::<u64>();
            measured * padded(PAGE, 128) + records * padded(PAGE_INFO, 128)
        }
        Technology::Tdx => {
            let Ok(tdvf) = Tdvf::parse(image) else {
                return 0;
            };
            let launch = tdvf.launch();
            let measured = launch.pages().filter(|page| page.measured).count() as u64;
            let added = launch.page_count();
            padded(added * PAGE_ADD + measured * (PAGE / 256) * EXTEND, 128)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::padded;

    #[test]
    fn a_message_is_padded_to_whole_blocks() {
        for (length, block, want) in [
            (0, 64, 64),
            (55, 64, 64),
            (56, 64, 128),
            (111, 128, 128),
            (112, 128, 256),
            (4096, 128, 4224),
        ] {
            assert_eq!(padded(length, block), want, "{length}");
        }
    }
}
