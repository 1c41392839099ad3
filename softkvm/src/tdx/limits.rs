//! The limits of TDs on this machine, and CAPABILITIES, which shows them.

use kvm_ops::sim::SimHost;
use kvm_ops::tdx::CpuidRow;
use kvm_ops_uapi::checks::tdx_capabilities::{COPY_BACK, FLAGS, MEMORY, NENT, ROOM};
use kvm_ops_uapi::system::{CPUID_FLAG_SIGNIFICANT_INDEX, CpuidEntry2};
use kvm_ops_uapi::tdx::TdxCapabilities;
use kvm_ops_uapi::{U32, U64};

use super::command::Call;
use crate::arg;
use crate::refusal::{Result, ensure};

/// SEPT_VE_DISABLE, the one attribute that KVM lets a TD have.
const ATTRIBUTES: u64 = 1 << 28;
/// Functions that leave to user space, in R11 of GetTdVmCallInfo: SetupEventNotifyInterrupt.
pub(super) const USER_FUNCTIONS: u64 = 1 << 1;
/// The bit of CONFIG_FLAGS that says that a TD may have 52 bits of guest-physical address.
const WIDE: u64 = 1 << 0;

/// The leaf whose EAX has the guest-physical width in bits 23:16.
pub(super) const ADDRESSES: u32 = 0x8000_0008;
const WIDTH_SHIFT: u32 = 16;
const WIDTH_MASK: u32 = 0xff << WIDTH_SHIFT;
/// The leaf of XCR0 and IA32_XSS.
const STATES: u32 = 0xd;
/// The leaf of HLE, RTM (EBX) and WAITPKG (ECX), which KVM keeps from TDs.
const FEATURES: u32 = 7;
const TSX: u32 = 1 << 4 | 1 << 11;
const WAITPKG: u32 = 1 << 5;

/// The guest-physical width that leaf 0x80000008 says.
pub(super) const fn width(eax: u32) -> u32 {
    (eax & WIDTH_MASK) >> WIDTH_SHIFT
}

/// EAX of leaf 0x80000008 with that width.
pub(super) const fn with_width(eax: u32, bits: u32) -> u32 {
    eax & !WIDTH_MASK | bits << WIDTH_SHIFT & WIDTH_MASK
}

/// True if a TD would have a feature that KVM keeps from it.
pub(super) fn is_unsupported(entry: &CpuidEntry2) -> bool {
    let first = entry.function.get() == FEATURES && entry.index.get() == 0;
    first && (entry.ebx.get() & TSX != 0 || entry.ecx.get() & WAITPKG != 0)
}

/// The limits that TDX module, processor and KVM set to a TD.
pub(crate) struct Limits {
    /// Bits of ATTRIBUTES that INIT_VM takes, and those that every TD has.
    pub(super) attributes: (u64, u64),
    /// The same of XFAM.
    pub(super) xfam: (u64, u64),
    /// The guest-physical address may have 52 bits.
    pub(super) wide: bool,
    /// The configurable leaves, in the module's order.
    pub(super) rows: Vec<CpuidRow>,
}

impl Limits {
    /// Those of a machine. `None` without a TDX module, or with one that KVM supports nothing of.
    pub(crate) fn of(host: &SimHost, cpuid: &[CpuidEntry2]) -> Option<Self> {
        let limits = kvm_ops::tdx::Limits::of(host).ok()?;
        let (may, must) = limits.attributes;
        let states = processor_states(cpuid);
        let (xfam_may, xfam_must) = limits.xfam;
        let fits = ATTRIBUTES & must == must && states & xfam_must == xfam_must;
        fits.then_some(Self {
            attributes: (ATTRIBUTES & may, must),
            xfam: (states & xfam_may, xfam_must),
            wide: limits.config_flags & WIDE != 0,
            rows: limits.cpuid,
        })
    }
}

/// State components of XCR0 and IA32_XSS that the processor has: x87 and SSE at least.
fn processor_states(cpuid: &[CpuidEntry2]) -> u64 {
    let pair = |high: U32, low: U32| u64::from(high.get()) << 32 | u64::from(low.get());
    let leaf = cpuid.iter().filter(|entry| entry.function.get() == STATES);
    leaf.fold(0b11, |states, entry| {
        states
            | match entry.index.get() {
                0 => pair(entry.edx, entry.eax),
                1 => pair(entry.edx, entry.ecx),
                _ => 0,
            }
    })
}

/// A leaf's name, with the bits that the host may choose as its values.
fn mask_entry(row: &CpuidRow) -> CpuidEntry2 {
    let [mut eax, mut ebx, mut ecx, edx] = row.mask;
    if row.leaf == ADDRESSES {
        eax = with_width(eax, 0xff);
    }
    if (row.leaf, row.subleaf) == (FEATURES, Some(0)) {
        (ebx, ecx) = (ebx & !TSX, ecx & !WAITPKG);
    }
    entry((row.leaf, row.subleaf), [eax, ebx, ecx, edx])
}

/// The entry of a leaf, or of a sub-leaf.
pub(super) fn entry(
    (leaf, subleaf): (u32, Option<u32>),
    [eax, ebx, ecx, edx]: [u32; 4],
) -> CpuidEntry2 {
    CpuidEntry2 {
        function: U32::new(leaf),
        index: U32::new(subleaf.unwrap_or(0)),
        flags: U32::new(subleaf.map_or(0, |_| CPUID_FLAG_SIGNIFICANT_INDEX)),
        eax: U32::new(eax),
        ebx: U32::new(ebx),
        ecx: U32::new(ecx),
        edx: U32::new(edx),
        ..CpuidEntry2::default()
    }
}

/// CAPABILITIES. A list that is too short is told so without a number.
pub(super) fn capabilities(limits: &Limits, call: &Call<'_>) -> Result<i64> {
    const NENT_AT: u64 = std::mem::offset_of!(TdxCapabilities, nent) as u64;
    ensure(call.flags == 0, FLAGS)?;
    let room: U32 = arg::read(call.process, call.data.wrapping_add(NENT_AT), NENT)?;
    ensure(room.get() as usize >= limits.rows.len(), ROOM)?;
    call.vm.kernel().faults().allocate(MEMORY)?;
    let head = TdxCapabilities {
        supported_attrs: U64::new(limits.attributes.0),
        supported_xfam: U64::new(limits.xfam.0),
        user_tdvmcallinfo_1_r11: U64::new(USER_FUNCTIONS),
        nent: U32::new(limits.rows.len() as u32),
        ..TdxCapabilities::default()
    };
    let entries: Vec<CpuidEntry2> = limits.rows.iter().map(mask_entry).collect();
    arg::write(call.process, call.data, &head, COPY_BACK)?;
    let at = call.data.wrapping_add(size_of::<TdxCapabilities>() as u64);
    arg::write(call.process, at, &entries[..], COPY_BACK)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::Vendor;

    #[test]
    fn a_width_stands_in_bits_23_to_16_and_changes_nothing_else() {
        for eax in [0, !0, 0x1234_5678] {
            for bits in [0, 48, 52, 0xff] {
                assert_eq!(width(with_width(eax, bits)), bits);
                assert_eq!(with_width(eax, bits) & !WIDTH_MASK, eax & !WIDTH_MASK);
            }
        }
    }

    #[test]
    fn no_mask_has_a_feature_that_init_vm_refuses() {
        let row = |subleaf| CpuidRow {
            leaf: FEATURES,
            subleaf: Some(subleaf),
            mask: [!0; 4],
        };
        let [first, second] = [0, 1].map(|subleaf| mask_entry(&row(subleaf)));
        assert!(!is_unsupported(&first) && !is_unsupported(&second));
        assert_eq!((first.ebx.get(), first.ecx.get()), (!TSX, !WAITPKG));
        assert_eq!(
            (second.ebx.get(), second.ecx.get()),
            (!0, !0),
            "another leaf's bits"
        );
    }

    #[test]
    fn a_machine_without_a_module_has_no_limits() {
        assert!(Limits::of(&SimHost::new(Vendor::Amd), &[]).is_none());
        let limits = Limits::of(&SimHost::new(Vendor::Intel), &[]).unwrap();
        assert_eq!(
            (limits.attributes.0, limits.xfam),
            (ATTRIBUTES, (0b11, 0b11))
        );
    }
}
