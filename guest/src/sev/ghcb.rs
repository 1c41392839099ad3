//! The GHCB page: the fields that an exit passes to the host, and the host's answer (GHCB
//! specification, "GHCB Layout").

use crate::SharedBuffer;

/// The length of the page in bytes.
pub const GHCB_LEN: usize = 0x1000;

/// Offsets of the fields.
const RAX: usize = 0x1F8;
const RBX: usize = 0x318;
const EXIT_CODE: usize = 0x390;
const EXIT_INFO_1: usize = 0x398;
const EXIT_INFO_2: usize = 0x3A0;
/// A bit for each quadword before it: the field is passed.
const VALID: usize = 0x3F0;
const VALID_LEN: usize = 16;
const VERSION: usize = 0xFFA;
const USAGE: usize = 0xFFC;
/// The version of the protocol whose exits are here.
const PROTOCOL: u16 = 2;

/// Exits of SNP guests (GHCB specification, "GHCB Guest Request", SW_EXITCODE).
pub mod exit_code {
    /// SNP Guest Request: a message to the firmware. SW_EXITINFO1 is the page of the request,
    /// SW_EXITINFO2 that of the response.
    pub const GUEST_REQUEST: u64 = 0x8000_0011;
    /// SNP Extended Guest Request: the same, and certificates. RAX is the address of pages for them,
    /// RBX their number.
    pub const EXTENDED_GUEST_REQUEST: u64 = 0x8000_0012;
}

/// An exit with the GHCB page: the fields that it passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GhcbExit {
    /// SW_EXITCODE.
    pub code: u64,
    /// SW_EXITINFO1.
    pub info1: u64,
    /// SW_EXITINFO2.
    pub info2: u64,
    /// RAX, if the exit has it.
    pub rax: Option<u64>,
    /// RBX, if the exit has it.
    pub rbx: Option<u64>,
}

/// The host's answer in the GHCB page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GhcbAnswer {
    /// SW_EXITINFO1: 0 in its lower half if the host took the exit.
    pub info1: u64,
    /// SW_EXITINFO2.
    pub info2: u64,
    /// RBX, if the host passes it.
    pub rbx: Option<u64>,
}

/// Executes VMGEXIT with the GHCB page.
pub trait GhcbPort {
    /// Writes the fields into the GHCB, executes VMGEXIT, reads the answer.
    ///
    /// The GHCB MSR holds the page's address, and nothing else uses the page in between.
    fn ghcb_exit(&mut self, exit: GhcbExit) -> GhcbAnswer;
}

impl<P: GhcbPort + ?Sized> GhcbPort for &mut P {
    fn ghcb_exit(&mut self, exit: GhcbExit) -> GhcbAnswer {
        (**self).ghcb_exit(exit)
    }
}

impl GhcbExit {
    /// Writes the fields into a page, and nothing else of the guest: fields that are not passed stay
    /// as they are, and are not valid.
    pub fn write(&self, page: &mut impl SharedBuffer) {
        let mut fields = Fields::new(page);
        fields.put(EXIT_CODE, self.code);
        fields.put(EXIT_INFO_1, self.info1);
        fields.put(EXIT_INFO_2, self.info2);
        if let Some(rax) = self.rax {
            fields.put(RAX, rax);
        }
        if let Some(rbx) = self.rbx {
            fields.put(RBX, rbx);
        }
        let valid = fields.valid;
        page.write(VALID, &valid);
        page.write(VERSION, &PROTOCOL.to_le_bytes());
        page.write(USAGE, &[0; 4]);
    }

    /// Reads an exit as a host does. `None` if the page is of another version or use, or does not pass
    /// code and information.
    pub fn read(page: &mut impl SharedBuffer) -> Option<Self> {
        let (mut version, mut usage) = ([0; 2], [0; 4]);
        page.read(VERSION, &mut version);
        page.read(USAGE, &mut usage);
        if u16::from_le_bytes(version) > PROTOCOL || usage != [0; 4] {
            return None;
        }
        let mut fields = Fields::read(page);
        Some(Self {
            code: fields.get(EXIT_CODE)?,
            info1: fields.get(EXIT_INFO_1)?,
            info2: fields.get(EXIT_INFO_2)?,
            rax: fields.get(RAX),
            rbx: fields.get(RBX),
        })
    }
}

impl GhcbAnswer {
    /// The host did not understand the exit (SW_EXITINFO1 of 2), for this reason.
    pub const fn malformed(reason: u64) -> Self {
        Self {
            info1: 2,
            info2: reason,
            rbx: None,
        }
    }

    /// Reads the answer. A field that the host does not pass is 0.
    pub fn read(page: &mut impl SharedBuffer) -> Self {
        let mut fields = Fields::read(page);
        Self {
            info1: fields.get(EXIT_INFO_1).unwrap_or(0),
            info2: fields.get(EXIT_INFO_2).unwrap_or(0),
            rbx: fields.get(RBX),
        }
    }

    /// Writes the answer, as a host does.
    pub fn write(&self, page: &mut impl SharedBuffer) {
        let mut fields = Fields::new(page);
        fields.put(EXIT_INFO_1, self.info1);
        fields.put(EXIT_INFO_2, self.info2);
        if let Some(rbx) = self.rbx {
            fields.put(RBX, rbx);
        }
        let valid = fields.valid;
        page.write(VALID, &valid);
    }
}

/// The quadwords of a page, with the bits that say which are passed.
struct Fields<'a, M> {
    page: &'a mut M,
    valid: [u8; VALID_LEN],
}

impl<'a, M: SharedBuffer> Fields<'a, M> {
    /// None is passed yet.
    fn new(page: &'a mut M) -> Self {
        let valid = [0; VALID_LEN];
        Self { page, valid }
    }

    fn read(page: &'a mut M) -> Self {
        let mut fields = Self::new(page);
        fields.page.read(VALID, &mut fields.valid);
        fields
    }

    fn put(&mut self, at: usize, value: u64) {
        self.page.write(at, &value.to_le_bytes());
        self.valid[at / 64] |= 1 << (at / 8 % 8);
    }

    fn get(&mut self, at: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        self.page.read(at, &mut bytes);
        let is_valid = self.valid[at / 64] >> (at / 8 % 8) & 1 == 1;
        is_valid.then_some(u64::from_le_bytes(bytes))
    }
}
