//! Firmware with TDVF metadata as the measured start of a TD.

use kvm_ops::{Gpa, InitialPageKind};
use kvm_ops_tdvf::{Order, PageAdd, Section, SectionKind, Step, Tdvf};

use super::super::launch::{LaunchPage, LaunchStep};
use super::super::layout::{FOUR_GIB, RAM_HOLE};
use super::{GuestRam, Image, ImageFormat, MachineError, hob, measured, parse};

fn metadata(image: &Image) -> Result<Tdvf<'_>, MachineError> {
    Tdvf::parse(&image.bytes).map_err(|error| parse(ImageFormat::Firmware, image, error))
}

/// The bytes below 4 GiB that the firmware needs beside the RAM.
pub(super) fn rom_bytes(image: &Image) -> Result<u64, MachineError> {
    let tdvf = metadata(image)?;
    let addresses = tdvf.sections().iter().map(|section| section.memory_address);
    let lowest = addresses
        .filter(|at| (RAM_HOLE..FOUR_GIB).contains(at))
        .min();
    Ok(lowest.map_or(0, |at| FOUR_GIB - at))
}

/// The pages in the order in which they are added and measured. The section of the hand-off blocks describes the memory.
pub(super) fn start(
    image: &Image,
    ram: &GuestRam,
    order: Order,
) -> Result<Vec<LaunchStep>, MachineError> {
    let tdvf = metadata(image)?;
    let sections = tdvf.sections();
    for section in sections.iter().filter(|section| !section.attributes.aug) {
        measured::has_room(image, ram, section.memory_address, section.memory_size)?;
    }
    let mut launch = tdvf.launch();
    let is_list = |section: &Section| section.kind == SectionKind::TdHob;
    if let Some(number) = sections.iter().position(is_list) {
        let list = hand_off(sections[number].memory_address, ram, sections);
        launch
            .fill(number, list)
            .map_err(|error| parse(ImageFormat::Firmware, image, error))?;
    }
    let page = |page: PageAdd<'_>| LaunchPage {
        gpa: Gpa::new(page.gpa),
        contents: Box::new(*page.contents),
        kind: InitialPageKind::Unmeasured,
    };
    let step = |step: Step<'_>| match step {
        Step::Add(added) => page(added).into(),
        Step::Measure(added) => LaunchStep::Measure(Gpa::new(added.gpa)),
    };
    Ok(launch.steps(order).map(step).collect())
}

fn hand_off(at: u64, ram: &GuestRam, sections: &[Section]) -> Vec<u8> {
    let added = sections.iter().filter(|section| !section.attributes.aug);
    let mut accepted: Vec<_> = added
        .map(|section| (section.memory_address, section.memory_size))
        .collect();
    accepted.sort_unstable();
    let ram: Vec<_> = ram
        .ram_ranges()
        .map(|(start, bytes)| (start.get(), bytes))
        .collect();
    hob::list(at, &ram, &accepted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops_tdvf::{Attributes, compose};

    const HAND_OFF: u64 = 0x9000;

    /// Firmware of 64 KiB with a measured volume, and temporary memory and a hand-off block of `pages` pages.
    fn firmware(pages: u64) -> Image {
        let section = |kind, memory_address, memory_size, raw_size, extend| Section {
            kind,
            data_offset: 0,
            raw_size,
            memory_address,
            memory_size,
            attributes: Attributes { extend, aug: false },
        };
        let sections = [
            section(SectionKind::Bfv, 0xffff_0000, 0x1_0000, 0x1_0000, true),
            section(SectionKind::TempMem, 0x4000, 0x2000, 0, false),
            section(SectionKind::TdHob, HAND_OFF, pages * 0x1000, 0, false),
        ];
        let mut bytes = vec![1; 0x1_0000];
        compose(&mut bytes, &sections).unwrap();
        Image::from_bytes("firmware", bytes).with_format(ImageFormat::Firmware)
    }

    fn ram(image: &Image, bytes: u64) -> GuestRam {
        GuestRam::new(bytes, rom_bytes(image).unwrap(), true).unwrap()
    }

    #[test]
    fn the_hand_off_block_lies_in_its_page_and_the_volume_is_measured() {
        let image = firmware(1);
        let ram = ram(&image, 1 << 20);
        let steps = start(&image, &ram, Order::SinglePass).unwrap();
        let pages = steps.iter().filter_map(|step| match step {
            LaunchStep::Add(page) => Some(page),
            LaunchStep::Measure(_) => None,
        });
        let block = pages
            .clone()
            .find(|page| page.gpa.get() == HAND_OFF)
            .unwrap();
        // The first block's kind and size, and that of the piece of memory behind it.
        assert_eq!(block.contents[..4], [1, 0, 56, 0]);
        assert_eq!(block.contents[56..60], [3, 0, 48, 0]);
        assert_eq!((pages.count(), steps.len()), (16 + 2 + 1, 19 + 16));
        // The order of the steps, and nothing else, is another one.
        let two_pass = start(&image, &ram, Order::TwoPass).unwrap();
        assert_eq!(two_pass.len(), steps.len());
        assert!(two_pass != steps && two_pass.iter().all(|step| steps.contains(step)));
    }

    #[test]
    fn a_section_without_memory_is_refused_with_its_place() {
        let image = firmware(4);
        let refused = start(&image, &ram(&image, 0xb000), Order::SinglePass).unwrap_err();
        let MachineError::ImageTooLarge {
            bytes, at, room, ..
        } = refused
        else {
            panic!("{refused}");
        };
        assert_eq!((bytes, at.get(), room), (0x4000, HAND_OFF, 0x2000));
    }

    #[test]
    fn firmware_without_metadata_is_refused() {
        let image = Image::from_bytes("rom", vec![1; 0x1_0000]).with_format(ImageFormat::Firmware);
        let refused = rom_bytes(&image).unwrap_err();
        assert!(
            matches!(refused, MachineError::BadImage { .. }),
            "{refused}"
        );
    }
}
