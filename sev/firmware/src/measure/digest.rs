//! The running digests themselves.

use super::stream::Stream;
use sha2::{Digest, Sha384};

/// Size of a measured page.
pub const PAGE_SIZE: usize = 4096;

/// SHA-384 of a byte string.
pub fn sha384(bytes: &[u8]) -> [u8; 48] {
    Sha384::digest(bytes).into()
}

/// Launch digest of SEV and SEV-ES: one SHA-256 over everything in call order. No address,
/// length or page type enters it.
#[derive(Clone, Default)]
pub struct SevDigest(Stream);

impl std::fmt::Debug for SevDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SevDigest(..)")
    }
}

impl SevDigest {
    /// An empty digest, as LAUNCH_START leaves it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the plain text of an update.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of what was added so far.
    pub fn value(&self) -> [u8; 32] {
        self.0.value()
    }
}

/// Type of a page at SNP_LAUNCH_UPDATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageType {
    /// Measured with its content.
    Normal = 1,
    /// Register state of a vCPU, measured with its content.
    Vmsa = 2,
    /// Cleared by the firmware; measured by type and address only.
    Zero = 3,
    /// Content not measured; type and address are.
    Unmeasured = 4,
    /// Filled by the firmware with the guest's message keys.
    Secrets = 5,
    /// Table of CPUID answers, checked and corrected by the firmware.
    Cpuid = 6,
}

impl PageType {
    /// Every type in order of its number.
    pub const ALL: [PageType; 6] = [
        PageType::Normal,
        PageType::Vmsa,
        PageType::Zero,
        PageType::Unmeasured,
        PageType::Secrets,
        PageType::Cpuid,
    ];

    /// Reads the number used in the command buffer.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|t| *t as u8 == number)
    }

    /// Returns true if the content of the page enters the digest.
    pub fn measures_content(self) -> bool {
        matches!(self, PageType::Normal | PageType::Vmsa)
    }
}

/// Permission masks of VMPL1 to VMPL3 on a page: bit 0 read, 1 write, 2 user execute,
/// 3 supervisor execute. VMPL0 always has all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmplPermissions {
    /// Mask of VMPL1.
    pub vmpl1: u8,
    /// Mask of VMPL2.
    pub vmpl2: u8,
    /// Mask of VMPL3.
    pub vmpl3: u8,
}

/// Contribution of one page to the SNP launch digest.
#[derive(Clone, Copy, Debug)]
pub struct PageInfo {
    /// Type of the page.
    pub page_type: PageType,
    /// Guest physical address.
    pub gpa: u64,
    /// True if the page belongs to an initial migration image.
    pub imi: bool,
    /// Permissions of the lower VMPLs.
    pub permissions: VmplPermissions,
}

impl PageInfo {
    /// A page with no lower-VMPL permissions that is not part of a migration image.
    pub fn new(page_type: PageType, gpa: u64) -> Self {
        Self {
            page_type,
            gpa,
            imi: false,
            permissions: VmplPermissions::default(),
        }
    }
}

/// Launch digest of SEV-SNP: a chain in which each page's PAGE_INFO record, 0x70 bytes that begin
/// with the digest so far, is hashed with SHA-384.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnpDigest([u8; 48]);

impl Default for SnpDigest {
    fn default() -> Self {
        Self([0; 48])
    }
}

impl SnpDigest {
    /// The digest of a guest without pages: 48 zero bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Continues from a known digest.
    pub fn from_value(value: [u8; 48]) -> Self {
        Self(value)
    }

    /// Adds one page. `content` is only hashed for the types that measure it.
    pub fn add_page(&mut self, info: &PageInfo, content: &[u8; PAGE_SIZE]) {
        if info.page_type.measures_content() {
            self.add(info, &sha384(content));
        } else {
            self.add_contentless(info);
        }
    }

    /// Adds a page of which the content's SHA-384 is known. It counts only for the types that measure
    /// their content.
    pub fn add_hashed(&mut self, info: &PageInfo, content_hash: &[u8; 48]) {
        if info.page_type.measures_content() {
            self.add(info, content_hash);
        } else {
            self.add_contentless(info);
        }
    }

    /// Adds a page whose content does not count. Asking this for a type that measures its content
    /// adds an all-zero content hash, which no real launch produces.
    pub fn add_contentless(&mut self, info: &PageInfo) {
        self.add(info, &[0; 48]);
    }

    fn add(&mut self, info: &PageInfo, content_hash: &[u8; 48]) {
        let mut record = [0_u8; 0x70];
        record[..0x30].copy_from_slice(&self.0);
        record[0x30..0x60].copy_from_slice(content_hash);
        record[0x60..0x62].copy_from_slice(&0x70_u16.to_le_bytes());
        record[0x62] = info.page_type as u8;
        record[0x63] = info.imi.into();
        record[0x64] = info.permissions.vmpl3;
        record[0x65] = info.permissions.vmpl2;
        record[0x66] = info.permissions.vmpl1;
        record[0x68..].copy_from_slice(&info.gpa.to_le_bytes());
        self.0 = sha384(&record);
    }

    /// The digest so far.
    pub fn value(&self) -> [u8; 48] {
        self.0
    }
}
