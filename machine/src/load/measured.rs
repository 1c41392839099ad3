//! ELF programs as confidential VMs: the pages of their measured start.

use std::collections::BTreeMap;

use kvm_ops::{InitialPageKind, Level, PAGE_SIZE, Tech};

use super::super::launch::{LaunchPage, LaunchStep};
use super::{Gpa, GuestRam, Image, ImageFormat, MachineError, elf};

/// Present and writable; and, in a table of directories, a page of 1 GiB.
const PTE: u64 = 0b11;
const PTE_LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;

pub(super) type Contents = Box<[u8; PAGE_SIZE as usize]>;

/// Checks that the image starts a confidential VM of that technology. Returns the bytes below 4 GiB that it needs beside
/// the RAM.
pub(crate) fn rom_bytes(image: &Image, tech: Tech, vcpus: u32) -> Result<u64, MachineError> {
    match (tech, image.runs_as()?) {
        (Tech::Tdx, ImageFormat::Elf) => Ok(super::td::start_bytes(vcpus)),
        #[cfg(feature = "tdx")]
        (Tech::Tdx, ImageFormat::Firmware) => super::tdvf::rom_bytes(image),
        (Tech::Sev | Tech::SevEs | Tech::SevSnp, ImageFormat::Elf) => Ok(super::sev::START_BYTES),
        #[cfg(feature = "sev")]
        (Tech::Sev | Tech::SevEs | Tech::SevSnp, ImageFormat::Firmware) => {
            super::firmware::rom_bytes(image)
        }
        _ => Err(not_launchable(image)),
    }
}

fn not_launchable(image: &Image) -> MachineError {
    MachineError::NotLaunchable {
        name: image.name.clone(),
    }
}

/// An option that would be ignored is a mistake of whoever gave it. Returns the image's format.
pub(super) fn refuse_unused(image: &Image) -> Result<ImageFormat, MachineError> {
    let format = image.runs_as()?;
    let firmware = format == ImageFormat::Firmware;
    let unused = [
        ("ACPI tables", image.acpi),
        ("kernel", image.kernel.is_some() && !firmware),
        (
            "command line",
            image.cmdline.is_some() && image.kernel.is_none(),
        ),
        ("initrd", image.initrd.is_some() && image.kernel.is_none()),
        ("load address", image.load_at.is_some()),
        ("entry", image.entry.is_some() && firmware),
    ];
    match unused.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(MachineError::OptionNotUsed { option, format }),
        None => Ok(format),
    }
}

/// Checks that there is memory for a part of the image.
#[cfg(any(feature = "tdx", feature = "sev"))]
pub(super) fn has_room(
    image: &Image,
    ram: &GuestRam,
    at: u64,
    bytes: u64,
) -> Result<(), MachineError> {
    let ranges = ram
        .regions()
        .map(|region| (region.gpa().get(), region.end().get()));
    let mut room = ranges.filter(|(start, end)| (*start..*end).contains(&at));
    match room.next().map_or(0, |(_, end)| end - at) {
        room if bytes <= room => Ok(()),
        room => Err(MachineError::ImageTooLarge {
            name: image.name.clone(),
            bytes,
            at: Gpa::new(at),
            room,
        }),
    }
}

/// The program of an ELF image.
pub(super) fn program<'a>(
    image: &'a Image,
    ram: &GuestRam,
) -> Result<elf::Program<'a>, MachineError> {
    let program = elf::open(image, ram, |_, _| Ok(()))?;
    match program.is_64_bit() {
        true => Ok(program),
        false => Err(not_launchable(image)),
    }
}

/// The pages of a start by their addresses.
#[derive(Default)]
pub(super) struct Pages(BTreeMap<u64, LaunchPage>);

/// The pages of the program's segments.
pub(super) fn pages(program: &elf::Program<'_>) -> Result<Pages, MachineError> {
    let mut pages = Pages::default();
    for segment in program.segments() {
        let contents = program.contents(segment)?;
        pages.put(segment.p_paddr, segment.p_memsz, contents);
    }
    Ok(pages)
}

impl Pages {
    /// Puts bytes at an address, and zeros behind them up to `memory` bytes.
    pub(super) fn put(&mut self, at: u64, memory: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < memory {
            let (page, offset) = ((at + done) & !(PAGE_SIZE - 1), (at + done) % PAGE_SIZE);
            let len = (PAGE_SIZE - offset).min(memory - done);
            let zeros = || LaunchPage::measured(Gpa::new(page), Box::new([0; PAGE_SIZE as usize]));
            let contents = &mut self.0.entry(page).or_insert_with(zeros).contents;
            let rest = bytes.get(done as usize..).unwrap_or_default();
            let copied = rest.len().min(len as usize);
            contents[offset as usize..][..copied].copy_from_slice(&rest[..copied]);
            done += len;
        }
    }

    /// Puts a page that the firmware fills or checks.
    pub(super) fn put_special(&mut self, at: u64, kind: InitialPageKind) {
        let zeros = Box::new([0; PAGE_SIZE as usize]);
        let page = LaunchPage {
            kind,
            ..LaunchPage::measured(Gpa::new(at), zeros)
        };
        self.0.insert(at, page);
    }

    /// Puts page tables of three pages: the root, a table that maps the first 512 GiB to themselves with
    /// the bits of private memory, and one that maps the same from the middle of the address space on with
    /// those of shared memory.
    pub(super) fn put_tables(&mut self, at: u64, private: u64, shared: u64) {
        let page = |n: u64| (at + n * PAGE_SIZE) | private | PTE;
        let mut root = vec![0; ENTRIES as usize];
        (root[0], root[256]) = (page(1), page(2));
        let gib = |bits: u64| {
            let page = move |n| (n * Level::Size1G.bytes()) | bits | PTE | PTE_LARGE;
            (0..ENTRIES).map(page).collect()
        };
        for (n, table) in (0..).zip([root, gib(private), gib(shared)]) {
            let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            self.put(at + n * PAGE_SIZE, PAGE_SIZE, &bytes);
        }
    }

    /// The steps of the start, from the lowest address.
    pub(super) fn into_steps(self) -> Vec<LaunchStep> {
        self.0.into_values().map(LaunchStep::from).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_to_their_pages_and_memory_beyond_them_is_zero() {
        let mut pages = Pages::default();
        pages.put(0x1ffe, 0x2004, &[1, 2, 3, 4]);
        assert_eq!(
            pages.0.keys().copied().collect::<Vec<_>>(),
            [0x1000, 0x2000, 0x3000, 0x4000]
        );
        assert_eq!(pages.0[&0x1000].contents[0xffc..], [0, 0, 1, 2]);
        assert_eq!(pages.0[&0x2000].contents[..4], [3, 4, 0, 0]);
        // Another segment in the same page leaves the first one alone.
        pages.put(0x2002, 2, &[5, 6]);
        assert_eq!(pages.0[&0x2000].contents[..4], [3, 4, 5, 6]);
    }
}
