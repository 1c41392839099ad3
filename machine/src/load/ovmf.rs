//! OVMF as the measured start of a SEV, SEV-ES or SNP guest.
//!
//! The image is measured whole, where a ROM lies. An SNP guest gets the sections of the firmware's SEV metadata besides, in
//! their order: memory that is valid from the start, secrets, CPUID values, and the hashes of the kernel that it starts.

use kvm_ops::{InitialPageKind, PAGE_SIZE, Tech};
use kvm_ops_ovmf::{KernelHashes, Ovmf, OvmfError, Section, SectionKind};

use super::super::launch::{LaunchPage, LaunchStep};
use super::super::layout::FOUR_GIB;
use super::measured::{self, Contents};
use super::{Gpa, GuestRam, Image, ImageFormat, MachineError, bad, parse};

/// The reset vector, where the first vCPU starts.
pub(super) const RESET_VECTOR: u32 = 0xffff_fff0;

/// The tables of the image. Without encrypted registers a guest starts without what they say.
fn tables(image: &Image, tech: Tech) -> Result<Ovmf, MachineError> {
    match Ovmf::parse(&image.bytes) {
        Err(OvmfError::NoFooter) if tech != Tech::SevSnp => Ok(Ovmf::default()),
        tables => tables.map_err(|error| unfit(image, error)),
    }
}

fn unfit(image: &Image, error: OvmfError) -> MachineError {
    parse(ImageFormat::Firmware, image, error)
}

/// The pages of the measured start, and the address at which vCPUs but the first begin.
pub(super) fn start(
    image: &Image,
    ram: &GuestRam,
    tech: Tech,
    vcpus: u32,
) -> Result<(Vec<LaunchStep>, u32), MachineError> {
    let tables = tables(image, tech)?;
    let base = FOUR_GIB - image.len() as u64;
    let pages = image.bytes.chunks_exact(PAGE_SIZE as usize);
    let page = |(at, bytes): (u64, &[u8])| {
        let mut contents = zeros();
        contents.copy_from_slice(bytes);
        LaunchPage::measured(Gpa::new(at), contents).into()
    };
    let addresses = (base..).step_by(PAGE_SIZE as usize);
    let mut steps: Vec<LaunchStep> = addresses.zip(pages).map(page).collect();
    if tech == Tech::SevSnp {
        let sections = tables.snp_sections().map_err(|error| unfit(image, error))?;
        // Once for all sections: a kernel and its initrd are many megabytes.
        let is_place = |section: &Section| section.kind == SectionKind::KernelHashes;
        let has_place = sections.iter().any(is_place);
        let hashes = has_place.then(|| image.kernel_hashes()).flatten();
        let page = hashes.map(|hashes| hashes_page(image, &tables, &hashes));
        let page = page.transpose()?;
        for section in sections {
            add(&mut steps, image, ram, page.as_ref(), section)?;
        }
    }
    // The table tells it only for guests whose registers are encrypted, and only they need it.
    let others = match (tables.reset_eip(), tech) {
        (Some(at), Tech::SevEs | Tech::SevSnp) => at,
        (None, Tech::SevEs | Tech::SevSnp) if vcpus > 1 => {
            let what =
                "the number of vCPUs, for which it has no start address (SEV-ES reset block),";
            return Err(bad(ImageFormat::Firmware, image, what, vcpus));
        }
        _ => RESET_VECTOR,
    };
    Ok((steps, others))
}

fn zeros() -> Contents {
    Box::new([0; PAGE_SIZE as usize])
}

/// Adds the pages of a section.
fn add(
    steps: &mut Vec<LaunchStep>,
    image: &Image,
    ram: &GuestRam,
    hashes: Option<&Contents>,
    section: &Section,
) -> Result<(), MachineError> {
    let at = u64::from(section.gpa);
    let (kind, contents, bytes) = match (section.kind, hashes) {
        (SectionKind::KernelHashes, Some(hashes)) => {
            (InitialPageKind::Measured, hashes.clone(), PAGE_SIZE)
        }
        // One page each, whatever length the section gives.
        (SectionKind::Secrets, _) => (InitialPageKind::Secrets, zeros(), PAGE_SIZE),
        (SectionKind::Cpuid, _) => (InitialPageKind::Cpuid, zeros(), PAGE_SIZE),
        (SectionKind::SecMem | SectionKind::SvsmCaa | SectionKind::KernelHashes, _) => {
            (InitialPageKind::Zero, zeros(), section.size.into())
        }
    };
    for (what, value) in [
        ("the address of a section", at),
        ("the size of a section", bytes),
    ] {
        if !value.is_multiple_of(PAGE_SIZE) {
            return Err(bad(ImageFormat::Firmware, image, what, value));
        }
    }
    measured::has_room(image, ram, at, bytes)?;
    let page = |at| {
        let contents = contents.clone();
        LaunchStep::Add(LaunchPage {
            gpa: Gpa::new(at),
            contents,
            kind,
        })
    };
    steps.extend((at..at + bytes).step_by(PAGE_SIZE as usize).map(page));
    Ok(())
}

/// The page of the hashes of the kernel that the firmware starts.
fn hashes_page(
    image: &Image,
    tables: &Ovmf,
    hashes: &KernelHashes,
) -> Result<Contents, MachineError> {
    let place = tables.hash_table().map_or(0, |region| region.gpa);
    hashes
        .page(place as usize % PAGE_SIZE as usize)
        .ok_or_else(|| {
            let what = "the address of the table of kernel hashes";
            bad(ImageFormat::Firmware, image, what, place)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    use kvm_ops_ovmf::{Region, compose};

    const HASHES: u32 = 0x9000;

    fn section(gpa: u32, size: u32, kind: SectionKind) -> Section {
        Section { gpa, size, kind }
    }

    /// Firmware of 16 KiB with a section of each kind.
    fn firmware(sections: &[Section]) -> Image {
        let mut bytes = vec![7; 0x4000];
        let table = Region {
            gpa: HASHES + 0xc00,
            size: 0x400,
        };
        compose(&mut bytes, sections, Some(0x80_b004), Some(table)).unwrap();
        Image::from_bytes("firmware", bytes).with_format(ImageFormat::Firmware)
    }

    fn all_kinds() -> Image {
        firmware(&[
            section(0x4000, 0x2000, SectionKind::SecMem),
            section(0x7000, 0x1000, SectionKind::Secrets),
            section(0x8000, 0x1000, SectionKind::Cpuid),
            section(HASHES, 0x1000, SectionKind::KernelHashes),
        ])
    }

    fn try_start(
        image: &Image,
        memory: u64,
        vcpus: u32,
    ) -> Result<(Vec<LaunchStep>, u32), MachineError> {
        let ram = GuestRam::new(memory, image.len() as u64, true).unwrap();
        start(image, &ram, Tech::SevSnp, vcpus)
    }

    fn pages(image: &Image) -> Vec<LaunchPage> {
        let (steps, others) = try_start(image, 1 << 20, 2).unwrap();
        assert_eq!(others, 0x80_b004);
        let page = |step| match step {
            LaunchStep::Add(page) => page,
            LaunchStep::Measure(_) => panic!("TDs only"),
        };
        steps.into_iter().map(page).collect()
    }

    #[test]
    fn the_image_comes_first_and_then_the_sections_in_their_order() {
        let image = all_kinds();
        let pages = pages(&image);
        let (rom, sections) = pages.split_at(4);
        let whole: Vec<u8> = rom.iter().flat_map(|page| *page.contents).collect();
        assert_eq!(whole, image.bytes[..]);
        assert_eq!(rom[0].gpa.get(), FOUR_GIB - 0x4000);
        let kinds: Vec<_> = sections
            .iter()
            .map(|page| (page.gpa.get(), page.kind))
            .collect();
        let expected = [
            (0x4000, InitialPageKind::Zero),
            (0x5000, InitialPageKind::Zero),
            (0x7000, InitialPageKind::Secrets),
            (0x8000, InitialPageKind::Cpuid),
            (0x9000, InitialPageKind::Zero),
        ];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn a_kernel_is_measured_by_its_hashes() {
        let image = all_kinds().kernel(vec![1; 64]).cmdline("quiet");
        let pages = pages(&image);
        let page = pages.last().unwrap();
        assert_eq!(
            (page.gpa.get(), page.kind),
            (HASHES.into(), InitialPageKind::Measured)
        );
        let expected = KernelHashes::new(&[1; 64], &[], Some("quiet"));
        assert_eq!(page.contents, expected.page(0xc00).unwrap());
    }

    #[test]
    fn sections_without_memory_or_in_the_middle_of_a_page_are_refused_with_their_numbers() {
        let refused = |image: &Image, memory, vcpus| try_start(image, memory, vcpus).unwrap_err();
        let MachineError::ImageTooLarge {
            bytes, at, room, ..
        } = refused(&all_kinds(), 0x5000, 1)
        else {
            panic!("too large");
        };
        assert_eq!((bytes, at.get(), room), (0x2000, 0x4000, 0x1000));
        for odd in [(0x4800, 0x1000), (0x4000, 0x1800)] {
            let image = firmware(&[section(odd.0, odd.1, SectionKind::SecMem)]);
            let error = refused(&image, 1 << 20, 1);
            assert!(matches!(error, MachineError::BadHeader { .. }), "{error}");
        }
    }

    #[test]
    fn an_image_without_metadata_starts_no_snp_guest_and_one_without_tables_a_sev_guest() {
        let plain = Image::from_bytes("rom", vec![1; 0x4000]).with_format(ImageFormat::Firmware);
        for image in [&plain, &firmware(&[])] {
            let error = try_start(image, 1 << 20, 1).unwrap_err();
            assert!(matches!(error, MachineError::BadImage { .. }), "{error}");
        }
        let ram = GuestRam::new(1 << 20, 0x4000, true).unwrap();
        let (steps, others) = start(&plain, &ram, Tech::Sev, 4).unwrap();
        assert_eq!((steps.len(), others), (4, RESET_VECTOR));
        // Without a start address there is one vCPU.
        assert_eq!(start(&plain, &ram, Tech::SevEs, 1).unwrap().0.len(), 4);
        let error = start(&plain, &ram, Tech::SevEs, 2).unwrap_err();
        assert!(
            matches!(error, MachineError::BadHeader { value: 2, .. }),
            "{error}"
        );
    }
}
