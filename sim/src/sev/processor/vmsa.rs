//! Encrypted register state: loaded from a vCPU's save area (VMSA) when it runs, stored there when it
//! leaves (APM vol. 2, appendix B, table B-4).

use std::sync::atomic::Ordering;

use kvm_ops::{Error, Exit, Gfn, Gpa, Hpa, Result, Step, Tech};
use kvm_ops_cpu::{Cpu, Registers, Segment, TableRegister, XSAVE_BYTES, XSAVE_PKRU};
use soft_amd_sp::AccessFault;

use super::platform;
use crate::processor::Processor;

const PAGE: usize = 4096;

/// Offsets of single fields.
const VMPL: usize = 0xca;
const CPL: usize = 0xcb;
const EFER: usize = 0xd0;
const CR4: usize = 0x148;
const CR3: usize = 0x150;
const CR0: usize = 0x158;
const DR7: usize = 0x160;
const DR6: usize = 0x168;
const RFLAGS: usize = 0x170;
const RIP: usize = 0x178;
const DR0: usize = 0x180;
const CR2: usize = 0x240;
const SEV_FEATURES: usize = 0x3b0;
const XCR0: usize = 0x3e8;
const MXCSR: usize = 0x408;
const X87: usize = 0x420;
const XMM: usize = 0x470;
/// The upper halves of YMM0 to YMM15.
const YMM: usize = 0x570;

/// ES, CS, SS, DS, FS, GS; then LDTR and TR.
const SEGMENTS: [usize; 8] = [0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x70, 0x90];
const GDTR: usize = 0x60;
const IDTR: usize = 0x80;

/// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
const GENERAL: [usize; 16] = [
    0x1f8, 0x308, 0x310, 0x318, 0x1d8, 0x328, 0x330, 0x338, 0x340, 0x348, 0x350, 0x358, 0x360,
    0x368, 0x370, 0x378,
];

/// MSRs of 8 bytes.
const MSRS: [(usize, u32); 9] = [
    (0x200, 0xc000_0081), // STAR
    (0x208, 0xc000_0082), // LSTAR
    (0x210, 0xc000_0083), // CSTAR
    (0x218, 0xc000_0084), // SFMASK
    (0x220, 0xc000_0102), // KERNEL_GS_BASE
    (0x228, 0x174),       // SYSENTER_CS
    (0x230, 0x175),       // SYSENTER_ESP
    (0x238, 0x176),       // SYSENTER_EIP
    (0x268, 0x277),       // PAT
];
const PKRU: usize = 0x2e8;
const TSC_AUX: usize = 0x2ec;

/// x87 fields: offset, offset in an XSAVE area, length.
const X87_FIELDS: [(usize, usize, usize); 5] = [
    (0x400, 16, 8), // data pointer
    (0x40e, 2, 2),  // status word
    (0x410, 0, 2),  // control word
    (0x412, 6, 2),  // opcode
    (0x418, 8, 8),  // instruction pointer
];
/// The abridged tag word of an XSAVE area, as the VMSA's field of two bytes.
const TAGS: usize = 0x40c;
const XSAVE_TAGS: usize = 4;
const XSAVE_MXCSR: usize = 24;
const XSAVE_X87: usize = 32;
const XSAVE_XMM: usize = 160;
const XSTATE_BV: usize = 512;
const XSAVE_YMM: usize = 576;
const X87_SSE_AVX_PKRU: u64 = 0b111 | 1 << 9;
/// x87 registers: the significands of all eight, and behind them what is left of each (Linux
/// `sev_es_sync_vmsa`).
const SIGNIFICAND: usize = 8;
const EXPONENTS: usize = X87 + 8 * SIGNIFICAND;

/// EFER.SVME, which a guest's save area always has and its EFER never shows.
const SVME: u64 = 1 << 12;
/// SEV_FEATURES: the guest is an SNP guest.
pub(super) const SNP_ACTIVE: u64 = 1;
/// The access rights of a segment that is not usable, as `kvm-ops-cpu` has them.
const UNUSABLE: u32 = 1 << 16;
const PRESENT: u32 = 1 << 7;

/// EXITCODE of a VMRUN that refuses the guest's state (VMEXIT_INVALID).
const INVALID: u64 = u64::MAX;

/// A save area, as it was loaded or stored last.
pub(super) struct Loaded {
    spa: u64,
    page: Box<[u8; PAGE]>,
}

impl Loaded {
    pub(super) fn features(&self) -> u64 {
        get(&self.page, SEV_FEATURES)
    }
}

fn get(page: &[u8; PAGE], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn put(page: &mut [u8; PAGE], at: usize, value: u64) {
    page[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn segment(page: &[u8; PAGE], at: usize) -> Segment {
    let word = get(page, at);
    let attributes = (word >> 16) as u32 & 0xfff;
    let rights = attributes & 0xff | (attributes & 0xf00) << 4;
    let unusable = if rights & PRESENT == 0 { UNUSABLE } else { 0 };
    Segment {
        selector: word as u16,
        base: get(page, at + 8),
        limit: (word >> 32) as u32,
        rights: rights | unusable,
    }
}

fn put_segment(page: &mut [u8; PAGE], at: usize, from: &Segment) {
    let usable = from.rights & UNUSABLE == 0;
    let mut attributes = from.rights & 0xff | from.rights >> 4 & 0xf00;
    if !usable {
        attributes &= !PRESENT;
    }
    let word = u64::from(from.selector) | u64::from(attributes) << 16 | u64::from(from.limit) << 32;
    put(page, at, word);
    put(page, at + 8, from.base);
}

fn table(page: &[u8; PAGE], at: usize) -> TableRegister {
    TableRegister {
        base: get(page, at + 8),
        limit: (get(page, at) >> 32) as u16,
    }
}

fn put_table(page: &mut [u8; PAGE], at: usize, from: &TableRegister) {
    put(page, at, u64::from(from.limit) << 32);
    put(page, at + 8, from.base);
}

/// Loads the registers. A value that the processor cannot hold is left as it is there.
fn load(cpu: &mut Cpu, page: &[u8; PAGE]) {
    let [es, cs, ss, ds, fs, gs, ldtr, tr] = SEGMENTS.map(|at| segment(page, at));
    let now = cpu.registers();
    cpu.set_registers(&Registers {
        gpr: GENERAL.map(|at| get(page, at)),
        rip: get(page, RIP),
        rflags: get(page, RFLAGS),
        segments: [es, cs, ss, ds, fs, gs],
        ldtr,
        tr,
        gdtr: table(page, GDTR),
        idtr: table(page, IDTR),
        cr0: get(page, CR0),
        cr2: get(page, CR2),
        cr3: get(page, CR3),
        cr4: get(page, CR4),
        efer: get(page, EFER) & !SVME,
        xcr0: get(page, XCR0),
        breakpoints: [0, 8, 16, 24].map(|n| get(page, DR0 + n)),
        dr6: get(page, DR6),
        dr7: get(page, DR7),
        ..now
    });
    for (at, msr) in MSRS {
        let _ = cpu.write_msr(msr, get(page, at));
    }
    cpu.set_tsc_aux(get(page, TSC_AUX) as u32);
    let mut area = [0; XSAVE_BYTES];
    for (at, to, len) in X87_FIELDS {
        area[to..to + len].copy_from_slice(&page[at..at + len]);
    }
    area[XSAVE_TAGS] = page[TAGS];
    area[XSAVE_MXCSR..XSAVE_MXCSR + 4].copy_from_slice(&page[MXCSR..MXCSR + 4]);
    for n in 0..8 {
        let register = &mut area[XSAVE_X87 + n * 16..];
        register[..8].copy_from_slice(&page[X87 + n * SIGNIFICAND..][..8]);
        register[8..10].copy_from_slice(&page[EXPONENTS + n * 2..][..2]);
    }
    area[XSAVE_XMM..XSAVE_XMM + 256].copy_from_slice(&page[XMM..XMM + 256]);
    area[XSAVE_YMM..XSAVE_YMM + 256].copy_from_slice(&page[YMM..YMM + 256]);
    area[XSAVE_PKRU..XSAVE_PKRU + 4].copy_from_slice(&page[PKRU..PKRU + 4]);
    area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&X87_SSE_AVX_PKRU.to_le_bytes());
    let _ = cpu.load_xsave(&area);
}

/// Stores the registers; what else the page holds stays.
fn store(cpu: &Cpu, page: &mut [u8; PAGE]) {
    let r = cpu.registers();
    let [es, cs, ss, ds, fs, gs] = &r.segments;
    for (at, from) in SEGMENTS
        .into_iter()
        .zip([es, cs, ss, ds, fs, gs, &r.ldtr, &r.tr])
    {
        put_segment(page, at, from);
    }
    put_table(page, GDTR, &r.gdtr);
    put_table(page, IDTR, &r.idtr);
    for (at, value) in GENERAL.into_iter().zip(r.gpr) {
        put(page, at, value);
    }
    for (at, value) in [
        (EFER, r.efer | SVME),
        (CR4, r.cr4),
        (CR3, r.cr3),
        (CR0, r.cr0),
        (DR7, r.dr7),
        (DR6, r.dr6),
        (RFLAGS, r.rflags),
        (RIP, r.rip),
        (CR2, r.cr2),
        (XCR0, r.xcr0),
    ] {
        put(page, at, value);
    }
    for (n, value) in r.breakpoints.into_iter().enumerate() {
        put(page, DR0 + n * 8, value);
    }
    for (at, msr) in MSRS {
        put(page, at, cpu.read_msr(msr).unwrap_or(0));
    }
    page[TSC_AUX..TSC_AUX + 4].copy_from_slice(&cpu.tsc_aux().to_le_bytes());
    page[CPL] = cpu.cpl();
    let area = cpu.save_xsave();
    for (at, from, len) in X87_FIELDS {
        page[at..at + len].copy_from_slice(&area[from..from + len]);
    }
    page[TAGS..TAGS + 2].copy_from_slice(&[area[XSAVE_TAGS], 0]);
    page[MXCSR..MXCSR + 4].copy_from_slice(&area[XSAVE_MXCSR..XSAVE_MXCSR + 4]);
    for n in 0..8 {
        let register = &area[XSAVE_X87 + n * 16..];
        page[X87 + n * SIGNIFICAND..][..8].copy_from_slice(&register[..8]);
        page[EXPONENTS + n * 2..][..2].copy_from_slice(&register[8..10]);
    }
    page[XMM..XMM + 256].copy_from_slice(&area[XSAVE_XMM..XSAVE_XMM + 256]);
    page[YMM..YMM + 256].copy_from_slice(&area[XSAVE_YMM..XSAVE_YMM + 256]);
    page[PKRU..PKRU + 4].copy_from_slice(&area[XSAVE_PKRU..XSAVE_PKRU + 4]);
}

fn refused() -> Exit {
    Exit::FailEntry {
        reason: INVALID,
        cpu: 0,
    }
}

impl Processor {
    /// VMRUN: loads the encrypted register state. `Some` if the processor refuses it.
    pub(crate) fn load_vmsa(&mut self) -> Result<Option<Exit>> {
        if self.sev.is_none() || !self.vm.has_vmsas() {
            return Ok(None);
        }
        let (asid, spa) = self.vmsa_place()?;
        let page = match platform(&self.vm)?.vmsa_read(asid, spa) {
            Ok(page) => page,
            Err(AccessFault::NotVmsa(_)) => return Ok(Some(refused())),
            Err(_) => return Err(Error::Invalid(kvm_ops::Field::HostAddress, spa)),
        };
        let snp = self.vm.tech == Tech::SevSnp;
        let fits = get(&page, SEV_FEATURES) & SNP_ACTIVE == u64::from(snp)
            && get(&page, EFER) & SVME != 0
            && page[VMPL] < 4;
        let side = self.side()?;
        let same = match &side.loaded {
            // Without SNP the state has a checksum, which only the processor knows: what the host wrote
            // is not loaded.
            Some(loaded) if !snp && loaded.spa == spa && loaded.page != page => false,
            _ => true,
        };
        if !fits || !same {
            return Ok(Some(refused()));
        }
        side.shared.vmpl.store(page[VMPL], Ordering::Relaxed);
        let known = side.loaded.as_ref();
        let changed = known.is_none_or(|known| known.spa != spa || known.page != page);
        if changed {
            side.shared.generation.fetch_add(1, Ordering::Relaxed);
            load(&mut self.cpu, &page);
        }
        self.side()?.loaded = Some(Loaded { spa, page });
        Ok(None)
    }

    /// #VMEXIT: stores the register state.
    pub(crate) fn store_vmsa(&mut self) -> Result<()> {
        if self.sev.is_none() || !self.vm.has_vmsas() {
            return Ok(());
        }
        let Some(mut loaded) = self.side()?.loaded.take() else {
            return Ok(());
        };
        store(&self.cpu, &mut loaded.page);
        let asid = self.vm.sev.asid();
        let spa = loaded.spa;
        if let Some(asid) = asid {
            // A page that the RMP took from the guest meanwhile is not written. The next entry fails.
            let stored = platform(&self.vm)?.vmsa_write(asid.0, spa, &loaded.page);
            if let Err(fault) = stored {
                let vcpu = self.id.0;
                tracing::warn!(vcpu, %fault, "the register state is lost");
                return Ok(());
            }
        }
        self.side()?.loaded = Some(loaded);
        Ok(())
    }

    /// The ASID, and the page of the save area: the back end's, or one that the guest made.
    fn vmsa_place(&self) -> Result<(u32, u64)> {
        let wrong = Error::WrongState(Step::Initialized);
        let asid = self.vm.sev.asid().ok_or(wrong)?.0;
        let spa = match self.vm.sev.vcpu(self.id).vmsa {
            Some(gpa) => {
                let gfn = Gfn::containing(Gpa::new(gpa));
                self.vm.sev.read().page(gfn, 0).map(|page| page.spa)
            }
            None => self
                .vm
                .sev
                .back_end()
                .and_then(|back_end| back_end.vmsa(self.id))
                .map(Hpa::get),
        };
        Ok((asid, spa.ok_or(wrong)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops_cpu::{Access, Bus, CodePages, CpuidTable, Mapping};

    struct Nothing;

    impl Bus for Nothing {
        fn map(&mut self, _: u64, _: Access) -> Mapping {
            Mapping::Device
        }
        fn read(&mut self, _: u64, _: &mut [u8]) -> bool {
            false
        }
        fn write(&mut self, _: u64, _: &[u8]) -> bool {
            false
        }
        fn port_in(&mut self, _: u16, _: u8) -> Option<u32> {
            None
        }
        fn port_out(&mut self, _: u16, _: u8, _: u32) -> Option<()> {
            None
        }
    }

    fn cpu() -> Cpu {
        Cpu::new(Box::new(Nothing), CodePages::new(1), CpuidTable::amd())
    }

    /// A save area in long mode with another value in each field.
    fn sample() -> Box<[u8; PAGE]> {
        let mut page = Box::new([0; PAGE]);
        for (n, at) in SEGMENTS.into_iter().enumerate() {
            let word = (n as u64 * 8) | (0xa93 << 16) | ((0xfff + n as u64) << 32);
            put(&mut page, at, word);
            put(&mut page, at + 8, n as u64 * 0x1000);
        }
        for (n, at) in [GDTR, IDTR].into_iter().enumerate() {
            put(&mut page, at, (0x7f + n as u64) << 32);
            put(&mut page, at + 8, 0x5000 + n as u64);
        }
        for (n, at) in GENERAL.into_iter().enumerate() {
            put(&mut page, at, 0x1111_1111 * n as u64 + 1);
        }
        for (n, (at, _)) in MSRS.into_iter().enumerate() {
            put(&mut page, at, 0x7000 + n as u64);
        }
        for (at, value) in [
            (EFER, 0x1d01),
            (CR4, 0x6a0),
            (CR3, 0x8_0000_0000_1000),
            (CR0, 0x8005_0033),
            (CR2, 0x1234),
            (DR6, 0xffff_0ff0),
            (DR7, 0x400),
            (RFLAGS, 0x202),
            (RIP, 0x20_0000),
            (XCR0, 3),
            (0x268, 0x0007_0406_0007_0406),
        ] {
            put(&mut page, at, value);
        }
        page[MXCSR..MXCSR + 4].copy_from_slice(&0x1f80u32.to_le_bytes());
        page[0x410..0x412].copy_from_slice(&0x37fu16.to_le_bytes());
        (page[PKRU], page[TSC_AUX]) = (5, 9);
        for n in 0..16 {
            page[XMM + n * 16] = n as u8 + 1;
            page[YMM + n * 16] = n as u8 + 0x11;
        }
        // Valid numbers in all registers.
        page[TAGS] = 0xff;
        for n in 0..8 {
            page[X87 + n * SIGNIFICAND + 7] = 0x80 | n as u8;
            page[EXPONENTS + n * 2..][..2].copy_from_slice(&0x4000u16.to_le_bytes());
        }
        page
    }

    #[test]
    fn what_is_loaded_is_stored_again() {
        let (mut cpu, sample) = (cpu(), sample());
        load(&mut cpu, &sample);
        let mut stored = Box::new([0; PAGE]);
        store(&cpu, &mut stored);
        let differs: Vec<_> = (0..PAGE)
            .filter(|at| sample[*at] != stored[*at])
            .map(|at| (at, stored[at], sample[at]))
            .collect();
        assert_eq!(differs, []);
    }

    #[test]
    fn a_segment_that_is_not_present_is_not_usable() {
        let mut page = [0; PAGE];
        put(&mut page, 0x30, 0x13 << 16);
        assert_eq!(segment(&page, 0x30).rights, 0x13 | UNUSABLE);
        let loaded = segment(&page, 0x30);
        put_segment(&mut page, 0x30, &loaded);
        assert_eq!(get(&page, 0x30), 0x13 << 16);
    }
}
