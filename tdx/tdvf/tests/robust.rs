//! No image makes the parser panic, and what it takes can be launched.

mod common;

use common::{bfv, memory, ovmf, pattern};
use kvm_ops_tdvf::{Attributes, Order, Section, SectionKind, Tdvf, compose};
use proptest::prelude::*;

const LEN: usize = 0x3000;

fn image() -> Vec<u8> {
    let mut image = pattern(LEN);
    let sections = [
        bfv(LEN as u32),
        memory(SectionKind::TdHob, 0x80_9000, 0x2000),
        memory(SectionKind::Payload, 0x100_0000, 0x3000),
    ];
    compose(&mut image, &sections).unwrap();
    image
}

/// Uses everything that a parse gives, as far as it is soon done.
fn use_up(image: &[u8]) {
    let Ok(tdvf) = Tdvf::parse(image) else { return };
    let launch = tdvf.launch();
    assert!(launch.page_count() <= 1 << 20);
    for page in launch.pages().take(64) {
        assert_eq!(page.gpa % 4096, 0);
        assert!(tdvf.sections()[page.section].memory().contains(&page.gpa));
    }
    if launch.page_count() < 64 {
        assert_eq!(launch.pages().count() as u64, launch.page_count());
        launch.mrtd(Order::TwoPass);
    }
}

/// A byte of the table or the metadata, and what is written there.
fn damage(length: usize, back: usize) -> impl Strategy<Value = Vec<(usize, u8)>> {
    let byte = (length.saturating_sub(back)..length, any::<u8>());
    prop::collection::vec(byte, 1..12)
}

proptest! {
    #[test]
    fn any_bytes(image in prop::collection::vec(any::<u8>(), 0..512)) {
        use_up(&image);
    }

    #[test]
    fn a_composed_image_with_damage(damage in damage(LEN, 200), cut in 0..LEN) {
        let mut image = image();
        for (at, byte) in damage {
            image[at] = byte;
        }
        use_up(&image);
        use_up(&image[cut..]);
        use_up(&image[..cut]);
    }

    /// Fields with values at the edges, where arithmetic goes wrong.
    #[test]
    fn edges_in_every_field(
        section in 0..3_usize,
        field in prop::sample::select(vec![(0, 4), (4, 4), (8, 8), (16, 8), (24, 4), (28, 4)]),
        base in prop::sample::select(vec![0_u64, 1 << 12, 1 << 31, 1 << 32, 1 << 47, 1 << 63]),
        near in -4097_i64..=4097,
    ) {
        let mut image = image();
        let (at, width) = field;
        let at = LEN - 32 - 18 - 22 - 96 + section * 32 + at;
        let value = base.wrapping_add_signed(near).to_le_bytes();
        image[at..at + width].copy_from_slice(&value[..width]);
        use_up(&image);
    }

    #[test]
    fn sections_that_are_composed_are_read_back(
        pages in 1..4_u32,
        others in prop::collection::vec(
            (0..4_u64, 1..3_u64, prop::sample::select(vec![
                SectionKind::TempMem,
                SectionKind::PermMem,
                SectionKind::Payload,
                SectionKind::PayloadParam,
            ]), any::<bool>()),
            0..6,
        ),
    ) {
        let mut image = pattern(LEN);
        let mut sections = vec![bfv(pages * 4096)];
        let mut at = 0x10_0000;
        for (gap, pages, kind, extend) in others {
            at += gap * 4096;
            sections.push(Section {
                attributes: Attributes { extend, aug: false },
                ..memory(kind, at, pages * 4096)
            });
            at += pages * 4096;
        }
        compose(&mut image, &sections).unwrap();
        let tdvf = Tdvf::parse(&image).unwrap();
        prop_assert_eq!(tdvf.sections(), &sections[..]);
        let gpas: Vec<u64> = tdvf.launch().pages().map(|page| page.gpa).collect();
        let expected: Vec<u64> = sections
            .iter()
            .flat_map(|section| section.memory().step_by(4096))
            .collect();
        prop_assert_eq!(gpas, expected);
    }
}

/// Every single bit of the real image's metadata and table.
#[test]
fn a_real_image_with_any_flipped_bit_near_its_metadata() {
    let Some((_, mut image)) = ovmf() else { return };
    let Ok(offset) = Tdvf::parse(&image).map(|tdvf| tdvf.metadata_offset()) else {
        println!("skipped: that image has no TDX metadata");
        return;
    };
    let table = image.len() - 0x100;
    for at in (offset..offset + 256).chain(table..table + 0x100) {
        for bit in 0..8 {
            image[at] ^= 1 << bit;
            if let Ok(tdvf) = Tdvf::parse(&image) {
                assert!(tdvf.launch().pages().take(600).count() > 0);
            }
            image[at] ^= 1 << bit;
        }
    }
}
