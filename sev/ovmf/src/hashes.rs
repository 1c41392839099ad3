//! The table of kernel, initrd and command line hashes that QEMU places in guest memory.

use sha2::{Digest, Sha256};

/// GUIDs in the mixed-endian byte order in which firmware images hold them.
pub(crate) const fn guid(text: &str) -> [u8; 16] {
    // The first three groups are little-endian integers, so their bytes are reversed.
    const PLACES: [usize; 16] = [6, 4, 2, 0, 11, 9, 16, 14, 19, 21, 24, 26, 28, 30, 32, 34];
    const fn digit(c: u8) -> u8 {
        match c {
            b'0'..=b'9' => c - b'0',
            b'a'..=b'f' => c - b'a' + 10,
            _ => panic!("a GUID is written in lower case hex"),
        }
    }
    let t = text.as_bytes();
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = digit(t[PLACES[i]]) << 4 | digit(t[PLACES[i] + 1]);
        i += 1;
    }
    out
}

const TABLE: [u8; 16] = guid("9438d606-4f22-4cc9-b479-a793d411fd21");
const CMDLINE: [u8; 16] = guid("97d02dd8-bd20-4c94-aa78-e7714d36ab2a");
const INITRD: [u8; 16] = guid("44baf731-3a2f-4bd7-9af1-41e29169781d");
const KERNEL: [u8; 16] = guid("4de79437-abd2-427f-b835-d5b172d2045b");

/// Length of the table with its padding to a multiple of 16.
pub const HASH_TABLE_LEN: usize = 176;
const HEADER: usize = 18;
const ENTRY: usize = 50;
const USED: usize = HEADER + 3 * ENTRY;

/// Hashes of what a directly booted kernel is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelHashes {
    cmdline: [u8; 32],
    initrd: [u8; 32],
    kernel: [u8; 32],
}

impl KernelHashes {
    /// Hashes the parts. The command line is hashed with its closing NUL; an absent one is the
    /// NUL alone, an absent initrd the empty string.
    pub fn new(kernel: &[u8], initrd: &[u8], append: Option<&str>) -> Self {
        let cmdline = Sha256::new()
            .chain_update(append.unwrap_or(""))
            .chain_update([0])
            .finalize();
        Self {
            cmdline: cmdline.into(),
            initrd: Sha256::digest(initrd).into(),
            kernel: Sha256::digest(kernel).into(),
        }
    }

    /// The table as it lies in guest memory.
    pub fn table(&self) -> [u8; HASH_TABLE_LEN] {
        let mut out = [0; HASH_TABLE_LEN];
        out[..16].copy_from_slice(&TABLE);
        out[16..HEADER].copy_from_slice(&(USED as u16).to_le_bytes());
        let entries = [
            (CMDLINE, self.cmdline),
            (INITRD, self.initrd),
            (KERNEL, self.kernel),
        ];
        for (slot, (guid, hash)) in out[HEADER..USED].chunks_exact_mut(ENTRY).zip(entries) {
            slot[..16].copy_from_slice(&guid);
            slot[16..HEADER].copy_from_slice(&(ENTRY as u16).to_le_bytes());
            slot[HEADER..].copy_from_slice(&hash);
        }
        out
    }

    /// A page of zeros with the table at `offset`, or `None` if it would not fit.
    pub fn page(&self, offset: usize) -> Option<Box<[u8; crate::PAGE_SIZE]>> {
        let mut page = Box::new([0; crate::PAGE_SIZE]);
        page.get_mut(offset..offset.checked_add(HASH_TABLE_LEN)?)?
            .copy_from_slice(&self.table());
        Some(page)
    }
}
