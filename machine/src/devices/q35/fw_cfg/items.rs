//! The items of the configuration device: some with keys of their own, files by a directory.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Keys of items that are no files (QEMU include/standard-headers/linux/qemu_fw_cfg.h).
const SIGNATURE: u16 = 0x00;
const FEATURES: u16 = 0x01;
const CPUS: u16 = 0x05;
const KERNEL_SIZE: u16 = 0x08;
const INITRD_SIZE: u16 = 0x0b;
const MAX_CPUS: u16 = 0x0f;
const KERNEL_DATA: u16 = 0x11;
const INITRD_DATA: u16 = 0x12;
const CMDLINE_SIZE: u16 = 0x14;
const CMDLINE_DATA: u16 = 0x15;
const SETUP_SIZE: u16 = 0x17;
const SETUP_DATA: u16 = 0x18;
const DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;

/// The traditional interface, and DMA.
const FEATURE_BITS: u32 = 0b11;

/// Bytes of a name in the directory, with its zero.
const NAME: usize = 56;

/// The sectors of a bzImage's setup code, in its first sector, and its default (Linux boot.rst, "setup_sects").
const SETUP_SECTS: usize = 0x1f1;
const DEFAULT_SETUP_SECTS: usize = 4;
const SECTOR: usize = 512;

/// The bytes of an item: its own, or a part of an image that others hold too.
#[derive(Clone)]
pub(crate) enum Item {
    Own(Vec<u8>),
    Part(Arc<[u8]>, usize, usize),
}

impl Item {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Part(bytes, from, to) => bytes.get(*from..*to).unwrap_or_default(),
        }
    }
}

impl From<Vec<u8>> for Item {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Own(bytes)
    }
}

pub(crate) struct Items {
    items: BTreeMap<u16, Item>,
    files: Vec<&'static str>,
}

impl Items {
    /// The items of a machine with that many vCPUs.
    pub(crate) fn new(vcpus: u32) -> Self {
        let vcpus = u16::try_from(vcpus).unwrap_or(u16::MAX).to_le_bytes();
        let items = [
            (SIGNATURE, b"QEMU".to_vec()),
            (FEATURES, FEATURE_BITS.to_le_bytes().to_vec()),
            (CPUS, vcpus.to_vec()),
            (MAX_CPUS, vcpus.to_vec()),
        ];
        let mut items = Self {
            items: items.map(|(key, bytes)| (key, bytes.into())).into(),
            files: Vec::new(),
        };
        items.write_directory();
        items
    }

    /// The bytes of an item; none if it is not there.
    pub(crate) fn get(&self, key: u16) -> &[u8] {
        self.items.get(&key).map(Item::bytes).unwrap_or_default()
    }

    /// The key of a file.
    pub(super) fn key(&self, name: &str) -> Option<u16> {
        let number = self.files.iter().position(|file| *file == name)?;
        Some(FIRST_FILE + number as u16)
    }

    /// Adds a file, or replaces the one with that name. Names are ASCII and shorter than 56 bytes.
    pub(crate) fn put_file(&mut self, name: &'static str, bytes: impl Into<Item>) {
        debug_assert!(name.len() < NAME);
        let key = self.key(name).unwrap_or_else(|| {
            self.files.push(name);
            FIRST_FILE + self.files.len() as u16 - 1
        });
        self.items.insert(key, bytes.into());
        self.write_directory();
    }

    fn write_directory(&mut self) {
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (key, name) in (FIRST_FILE..).zip(&self.files) {
            directory.extend((self.get(key).len() as u32).to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(name.bytes().chain(std::iter::repeat(0)).take(NAME));
        }
        self.items.insert(DIRECTORY, directory.into());
    }

    /// A kernel for the firmware to start: a bzImage in two parts, or anything else as one.
    pub(crate) fn set_kernel(&mut self, image: &Arc<[u8]>) {
        let sectors = match image.get(SETUP_SECTS) {
            Some(0) | None => DEFAULT_SETUP_SECTS,
            Some(sectors) => usize::from(*sectors),
        };
        let is_bzimage = image.get(0x202..0x206) == Some(b"HdrS");
        let setup = if is_bzimage {
            (sectors + 1) * SECTOR
        } else {
            0
        };
        let setup = setup.min(image.len());
        self.set(SETUP_SIZE, SETUP_DATA, Item::Part(image.clone(), 0, setup));
        let rest = Item::Part(image.clone(), setup, image.len());
        self.set(KERNEL_SIZE, KERNEL_DATA, rest);
    }

    pub(crate) fn set_initrd(&mut self, initrd: &Arc<[u8]>) {
        let item = Item::Part(initrd.clone(), 0, initrd.len());
        self.set(INITRD_SIZE, INITRD_DATA, item);
    }

    /// The kernel's command line, which ends with a zero.
    pub(crate) fn set_cmdline(&mut self, text: &str) {
        let item = [text.as_bytes(), &[0]].concat();
        self.set(CMDLINE_SIZE, CMDLINE_DATA, item.into());
    }

    fn set(&mut self, size: u16, data: u16, item: Item) {
        let bytes = (item.bytes().len() as u32).to_le_bytes().to_vec();
        self.items.insert(size, bytes.into());
        self.items.insert(data, item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_names_each_file_with_its_size_and_key() {
        let mut items = Items::new(2);
        assert_eq!(items.get(DIRECTORY), [0; 4]);
        items.put_file("etc/a", vec![7]);
        items.put_file("etc/b", vec![]);
        items.put_file("etc/a", vec![1, 2, 3]);
        let directory = items.get(DIRECTORY);
        assert_eq!(directory.len(), 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..18], *b"\0\0\0\x03\0\x20\0\0etc/a\0");
        assert_eq!(directory[68..82], *b"\0\0\0\0\0\x21\0\0etc/b\0");
        assert_eq!(
            (items.get(0x20), items.get(0x21)),
            (&[1, 2, 3][..], &[][..])
        );
        assert_eq!(items.get(CPUS), [2, 0]);
    }

    #[test]
    fn a_kernel_is_cut_behind_its_setup_code() {
        let mut image = vec![0; 4096];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[SETUP_SECTS] = 2;
        let cut = |image: Vec<u8>| {
            let mut items = Items::new(1);
            items.set_kernel(&image.into());
            let size = |key| u32::from_le_bytes(items.get(key).try_into().unwrap()) as usize;
            assert_eq!(size(SETUP_SIZE), items.get(SETUP_DATA).len());
            assert_eq!(size(KERNEL_SIZE), items.get(KERNEL_DATA).len());
            (size(SETUP_SIZE), size(KERNEL_SIZE))
        };
        assert_eq!(cut(image.clone()), (1536, 2560));
        image[SETUP_SECTS] = 0;
        assert_eq!(cut(image.clone()), (2560, 1536));
        // Shorter than its header says, and no bzImage at all.
        assert_eq!(cut(image[..0x300].to_vec()), (0x300, 0));
        assert_eq!(cut(vec![0; 4096]), (0, 4096));
        assert_eq!(cut(vec![]), (0, 0));
    }

    #[test]
    fn a_command_line_ends_with_a_zero() {
        let mut items = Items::new(1);
        items.set_cmdline("quiet");
        assert_eq!(items.get(CMDLINE_DATA), b"quiet\0");
        assert_eq!(items.get(CMDLINE_SIZE), [6, 0, 0, 0]);
    }
}
