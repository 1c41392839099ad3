//! Cases, made by tables.

pub(crate) mod descriptors;
pub(crate) mod gates;
pub(crate) mod pages;
pub(crate) mod system;

/// PE, ET, NE, WP, PG.
const CR0: u64 = 0x8001_0031;
/// PAE and MCE, which some hosts do not let a guest switch off.
const CR4: u64 = 0x60;
/// SCE, LME, LMA, NXE.
const EFER: u64 = 0xd01;

/// One instruction, or few, and the state that they find.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) code: Vec<u8>,
    /// 0 or 3.
    pub(crate) cpl: u8,
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
    pub cr0: u64,
    pub cr4: u64,
    pub(crate) efer: u64,
    /// Addresses, and what is there.
    pub(crate) memory: Vec<(u64, Vec<u8>)>,
    pub(crate) msrs: Vec<(u32, u64)>,
}

impl Case {
    /// The code at CPL 0, in 64-bit mode with paging; HLT follows it.
    pub(crate) fn new(name: impl Into<String>, code: &[u8]) -> Self {
        Self {
            name: name.into(),
            code: code.to_vec(),
            cpl: 0,
            gpr: [0; 16],
            rflags: 0,
            cr0: CR0,
            cr4: CR4,
            efer: EFER,
            memory: Vec::new(),
            msrs: Vec::new(),
        }
    }

    pub(crate) fn cpl(mut self, cpl: u8) -> Self {
        self.cpl = cpl;
        self
    }

    pub(crate) fn gpr(mut self, register: usize, value: u64) -> Self {
        self.gpr[register] = value;
        self
    }

    pub(crate) fn memory(mut self, at: u64, bytes: impl Into<Vec<u8>>) -> Self {
        self.memory.push((at, bytes.into()));
        self
    }

    pub(crate) fn words(self, at: u64, words: &[u64]) -> Self {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory(at, bytes)
    }
}
