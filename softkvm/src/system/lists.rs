//! Lists of MSRs.

use kvm_ops_uapi::system::{MsrEntry, MsrList, Msrs};
use kvm_ops_uapi::{Errno, U32, U64};
use zerocopy::IntoBytes;

use crate::refusal::Result;
use crate::{Kernel, Process, Refusal};

/// MSRs of a vCPU, with their value after power-on as KVM has it.
pub(crate) const MSRS: [(u32, u64); 21] = [
    (0x10, 0),           // IA32_TIME_STAMP_COUNTER
    (0x1b, 0xfee0_0900), // IA32_APIC_BASE
    (0x3b, 0),           // IA32_TSC_ADJUST
    (0x174, 0),          // IA32_SYSENTER_CS
    (0x175, 0),          // IA32_SYSENTER_ESP
    (0x176, 0),          // IA32_SYSENTER_EIP
    (0x17a, 0),          // IA32_MCG_STATUS
    (MISC_ENABLE, MISC_ENABLE_RESET),
    (0x1fc, 0),                     // IA32_POWER_CTL
    (0x277, 0x0007_0406_0007_0406), // IA32_PAT
    (0x6e0, 0),                     // IA32_TSC_DEADLINE
    (0xc000_0080, 0),               // EFER
    (0xc000_0081, 0),               // STAR
    (0xc000_0082, 0),               // LSTAR
    (0xc000_0083, 0),               // CSTAR
    (0xc000_0084, 0),               // SFMASK
    (0xc000_0100, 0),               // FS_BASE
    (0xc000_0101, 0),               // GS_BASE
    (0xc000_0102, 0),               // KERNEL_GS_BASE
    (0xc000_0103, 0),               // TSC_AUX
    (HWCR, 0),
];

/// IA32_MISC_ENABLE, and its value of a new vCPU: branch trace and PEBS are unavailable.
pub(crate) const MISC_ENABLE: u32 = 0x1a0;
pub(crate) const MISC_ENABLE_RESET: u64 = 1 << 11 | 1 << 12;

/// The MSR that AMD's processors alone have.
const HWCR: u32 = 0xc001_0015;

/// IA32_APIC_BASE, EFER, FS_BASE and GS_BASE: `KVM_SET_SREGS` sets them, and the list does not have them.
const IN_SREGS: [u32; 4] = [0x1b, 0xc000_0080, 0xc000_0100, 0xc000_0101];

/// MSRs that tell of features: the microcode's revision, which is that of a new vCPU.
fn features(kernel: &Kernel) -> [(u32, u64); 1] {
    [(
        0x8b,
        if kernel.is_amd() {
            0x0100_0065
        } else {
            1 << 32
        },
    )]
}

/// The most entries of one `KVM_GET_MSRS`.
pub(crate) const MAX_MSRS: u32 = 256;

pub(super) fn msr_indices(kernel: &Kernel, process: &dyn Process, argument: u64) -> Result<i64> {
    let all = MSRS.iter().map(|(index, _)| *index);
    let here = |index: &u32| !IN_SREGS.contains(index) && (kernel.is_amd() || *index != HWCR);
    let list: Vec<u32> = all.filter(here).collect();
    indices(process, argument, list.into_iter())
}

pub(super) fn feature_indices(
    kernel: &Kernel,
    process: &dyn Process,
    argument: u64,
) -> Result<i64> {
    let features = features(kernel).into_iter();
    indices(process, argument, features.map(|(index, _)| index))
}

/// The number that there are is written first, so that a caller who is short of room can ask again.
fn indices(
    process: &dyn Process,
    argument: u64,
    list: impl ExactSizeIterator<Item = u32>,
) -> Result<i64> {
    let fault = |_| Refusal::from(Errno::EFAULT);
    let mut head = MsrList::default();
    process.read(argument, head.as_mut_bytes()).map_err(fault)?;
    let (room, count) = (head.nmsrs.get(), list.len() as u32);
    head.nmsrs = U32::new(count);
    process.write(argument, head.as_bytes()).map_err(fault)?;
    if room < count {
        return Err(Errno::E2BIG.into());
    }
    let bytes: Vec<u8> = list.flat_map(u32::to_le_bytes).collect();
    let at = argument.wrapping_add(size_of::<MsrList>() as u64);
    process.write(at, &bytes).map_err(fault)?;
    Ok(0)
}

pub(super) fn get_features(kernel: &Kernel, process: &dyn Process, argument: u64) -> Result<i64> {
    let features = features(kernel);
    each_msr(process, argument, |entry| {
        let mut known = features.iter();
        let known = known.find(|(index, _)| *index == entry.index.get());
        known
            .map(|(_, value)| entry.data = U64::new(*value))
            .is_some()
    })
}

/// Passes the entries of a `struct kvm_msrs` to a function, up to the first that it does not know,
/// writes them back, and returns their number.
pub(crate) fn each_msr(
    process: &dyn Process,
    argument: u64,
    mut body: impl FnMut(&mut MsrEntry) -> bool,
) -> Result<i64> {
    let fault = |_| Refusal::from(Errno::EFAULT);
    let mut head = Msrs::default();
    process.read(argument, head.as_mut_bytes()).map_err(fault)?;
    if head.nmsrs.get() >= MAX_MSRS {
        return Err(Errno::E2BIG.into());
    }
    let mut done = 0;
    for index in 0..u64::from(head.nmsrs.get()) {
        let offset = size_of::<Msrs>() as u64 + index * size_of::<MsrEntry>() as u64;
        let at = argument.wrapping_add(offset);
        let mut entry = MsrEntry::default();
        process.read(at, entry.as_mut_bytes()).map_err(fault)?;
        if !body(&mut entry) {
            break;
        }
        process.write(at, entry.as_bytes()).map_err(fault)?;
        done += 1;
    }
    Ok(done)
}
