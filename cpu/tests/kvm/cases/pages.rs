//! Accesses to a page with every right, by every kind of access, under every control that matters.

use super::{CR0, CR4, Case, EFER};
use crate::machine::{DIRECTORY_ENTRY, FRAME, PAGE, PAGE_ENTRY};

const WP: u64 = 1 << 16;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const AC: u64 = 1 << 18;
const NXE: u64 = 1 << 11;

const ACCESSES: [(&str, &[u8]); 4] = [
    ("mov al, [rbx]", &[0x8a, 0x03]),
    ("mov [rbx], al", &[0x88, 0x03]),
    ("lock inc dword [rbx]", &[0xf0, 0xff, 0x03]),
    ("jmp rbx", &[0xff, 0xe3]),
];

/// Where the rights are taken away: in the entry of the page, in the directory above, or in a large page.
#[derive(Clone, Copy, Debug)]
enum Level {
    Page,
    Directory,
    Large,
}

pub(crate) fn all() -> impl Iterator<Item = Case> {
    let rights = 0..16u64;
    let controls = 0..32u64;
    controls
        .flat_map(move |controls| {
            rights.clone().flat_map(move |rights| {
                [Level::Page, Level::Directory, Level::Large]
                    .into_iter()
                    .flat_map(move |level| {
                        [0u8, 3].into_iter().flat_map(move |cpl| {
                            ACCESSES.map(move |access| case(access, cpl, rights, level, controls))
                        })
                    })
            })
        })
        .chain(reserved())
}

fn entry(rights: u64) -> u64 {
    rights & 7 | (rights & 8) << 60
}

fn case((name, code): (&str, &[u8]), cpl: u8, rights: u64, level: Level, controls: u64) -> Case {
    let on = |bit: u64, control: u64| if controls >> bit & 1 != 0 { control } else { 0 };
    let mut case = Case::new("", code).cpl(cpl).gpr(3, PAGE);
    case.cr0 = CR0 & !WP | on(0, WP);
    case.cr4 = CR4 | on(1, SMEP) | on(2, SMAP);
    case.rflags = on(3, AC);
    case.efer = EFER & !NXE | on(4, NXE);
    case.name = format!(
        "{name}, CPL {cpl}, {level:?} entry {:#x}, CR0 {:#x}, CR4 {:#x}, RFLAGS {:#x}, EFER {:#x}",
        entry(rights),
        case.cr0,
        case.cr4,
        case.rflags,
        case.efer
    );
    match level {
        Level::Page => case.words(PAGE_ENTRY, &[FRAME | entry(rights)]),
        Level::Directory => case.words(DIRECTORY_ENTRY, &[PAGE_ENTRY | entry(rights)]),
        // The 2 MiB at 0; the access is to its first bytes.
        Level::Large => case.words(DIRECTORY_ENTRY, &[entry(rights) | 1 << 7]),
    }
}

/// One bit more in an entry: reserved, ignored or with a meaning.
fn reserved() -> impl Iterator<Item = Case> {
    (3..63u64)
        .flat_map(|bit| {
            [Level::Page, Level::Directory, Level::Large]
                .into_iter()
                .flat_map(move |level| {
                    ACCESSES[..2].iter().map(move |access| {
                        let mut case = case(*access, 0, 7, level, 0x11);
                        case.name += &format!(", bit {bit}");
                        let (_, bytes) = case.memory.last_mut().expect("an entry");
                        bytes[bit as usize / 8] ^= 1 << (bit % 8);
                        case
                    })
                })
        })
        // An address outside of the test's memory is the host's to answer.
        .filter(|case| {
            let (_, bytes) = case.memory.last().expect("an entry");
            let entry = u64::from_le_bytes(bytes[..].try_into().expect("one entry"));
            entry & 0x000f_ffff_ffff_f000 & !((1 << 21) - 1) == 0 || case.name.contains("bit 51")
        })
}
