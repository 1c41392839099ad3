//! Images as SEV, SEV-ES and SNP guests. Firmware starts at the reset vector, with what its tables ask for (`ovmf`); an ELF
//! program gets the pages that lead to its entry here.
//!
//! The registers of the start are measured with the pages, so a program's vCPU starts in 64-bit mode at once. Pages
//! of ours lie below 4 GiB: a stack, page tables, and one with the descriptor table and the code that calls
//! the entry. An SNP guest has the firmware's pages with secrets and CPUID there too.

use kvm_ops::{InitialPageKind, PAGE_SIZE, SharedMask, Tech, VcpuId};

use super::super::launch::LaunchStep;
use super::super::layout::{FOUR_GIB, TD_STACK_TOP, TD_TABLES};
use super::super::start::{LongMode, MeasuredStart, gdt};
use super::measured;
use super::{Gpa, GuestRam, Image, MachineError};

/// The bytes below 4 GiB that the start takes: pages of the firmware, stack, page tables, code.
pub(crate) const START_BYTES: u64 = 0xa000;
/// The bytes of the stack with which a program starts.
const STACK: u64 = 4 * PAGE_SIZE;

/// Offsets in the last page.
const GDT: u64 = 0x800;
const LAST_PAGE: u64 = FOUR_GIB - PAGE_SIZE;

const SECRETS: u64 = FOUR_GIB - START_BYTES;
const CPUID: u64 = SECRETS + PAGE_SIZE;

/// `call rax`, and what a vCPU does that has nothing to do: `hlt; jmp` back to it.
const CODE: [u8; 5] = [0xff, 0xd0, 0xf4, 0xeb, 0xfd];
const PARK: u64 = 2;

/// The start of a guest: its pages, and the registers of its vCPUs.
pub(crate) struct GuestStart {
    pub(crate) steps: Vec<LaunchStep>,
    vcpus: Vcpus,
}

/// The way in which vCPUs start.
enum Vcpus {
    /// The first one calls the program's entry, the others halt.
    Program(Program),
    /// The first one starts at the reset vector, the others at this address.
    #[cfg(feature = "sev")]
    Firmware { others: u32 },
}

struct Program {
    entry: Gpa,
    memory: u64,
    mask: SharedMask,
    tech: Tech,
}

/// The measured start.
pub(crate) fn start(
    image: &Image,
    ram: &GuestRam,
    mask: SharedMask,
    tech: Tech,
    #[cfg(feature = "sev")] vcpus: u32,
) -> Result<GuestStart, MachineError> {
    match measured::refuse_unused(image)? {
        #[cfg(feature = "sev")]
        super::ImageFormat::Firmware => {
            let (steps, others) = super::ovmf::start(image, ram, tech, vcpus)?;
            let vcpus = Vcpus::Firmware { others };
            Ok(GuestStart { steps, vcpus })
        }
        _ => program(image, ram, mask, tech),
    }
}

/// The start of a program.
fn program(
    image: &Image,
    ram: &GuestRam,
    mask: SharedMask,
    tech: Tech,
) -> Result<GuestStart, MachineError> {
    let program = measured::program(image, ram)?;
    let mut pages = measured::pages(&program)?;
    if tech == Tech::SevSnp {
        pages.put_special(SECRETS, InitialPageKind::Secrets);
        pages.put_special(CPUID, InitialPageKind::Cpuid);
    }
    pages.put(TD_STACK_TOP.get() - STACK, STACK, &[]);
    pages.put_tables(TD_TABLES.get(), mask.bits(), 0);
    pages.put(LAST_PAGE, PAGE_SIZE, &CODE);
    let table: Vec<u8> = gdt(true)
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    pages.put(LAST_PAGE + GDT, table.len() as u64, &table);
    Ok(GuestStart {
        steps: pages.into_steps(),
        vcpus: Vcpus::Program(Program {
            entry: program.entry(),
            memory: ram.low_end().get(),
            mask,
            tech,
        }),
    })
}

impl GuestStart {
    /// The registers of a vCPU.
    pub(crate) fn registers(&self, vcpu: VcpuId) -> MeasuredStart {
        match &self.vcpus {
            Vcpus::Program(program) => MeasuredStart::Long(program.registers(vcpu)),
            #[cfg(feature = "sev")]
            Vcpus::Firmware { others } => MeasuredStart::Reset {
                entry: match vcpu.0 {
                    0 => super::ovmf::RESET_VECTOR,
                    _ => *others,
                },
            },
        }
    }
}

impl Program {
    fn registers(&self, vcpu: VcpuId) -> LongMode {
        let first = vcpu.0 == 0;
        let snp = self.tech == Tech::SevSnp;
        LongMode {
            rip: if first { LAST_PAGE } else { LAST_PAGE + PARK },
            rsp: TD_STACK_TOP.get(),
            cr3: TD_TABLES.get() | self.mask.bits(),
            gdt: Gpa::new(LAST_PAGE + GDT),
            rax: self.entry.get(),
            rdi: self.memory,
            rsi: vcpu.0.into(),
            rdx: self.mask.bits().trailing_zeros().into(),
            rcx: if snp { SECRETS } else { 0 },
            r8: if snp { CPUID } else { 0 },
        }
    }
}
