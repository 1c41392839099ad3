//! What a TD may have on this host, and the structure of INIT_VM.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ops::{Call, CpuidEntry, Error, Field, Gpaw, HeldFailure, Result, TdParams};
use kvm_ops_uapi::system::{CPUID_FLAG_SIGNIFICANT_INDEX, CpuidEntry2};
use kvm_ops_uapi::tdx::{self as uapi, ENTRY, MAX_CPUID_ENTRIES, TdxCapabilities, TdxInitVm};
use kvm_ops_uapi::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::blobs::Pages;
use super::tdx::on_vm;
use crate::KvmVm;

/// The leaf whose EAX\[23:16\] is the width of guest-physical addresses.
const ADDRESSES: u32 = 0x8000_0008;
const WIDTH: u32 = 0xff << 16;
/// Room for entries at first; it doubles while the kernel has more.
const ROOM: usize = 32;

/// The answer of CAPABILITIES.
pub(super) struct Capabilities {
    attributes: u64,
    xfam: u64,
    /// The bits of CPUID that are the host's to choose.
    masks: Vec<CpuidEntry2>,
}

impl Capabilities {
    pub(super) fn of(vm: &KvmVm) -> Result<Self, HeldFailure> {
        let mut room = ROOM;
        loop {
            match Self::ask(vm, room) {
                // Nothing says how many there are.
                Err(failure)
                    if failure.error.errno() == libc::E2BIG
                        && room < MAX_CPUID_ENTRIES as usize =>
                {
                    room *= 2;
                }
                asked => return asked,
            }
        }
    }

    fn ask(vm: &KvmVm, room: usize) -> Result<Self, HeldFailure> {
        let head = TdxCapabilities {
            nent: U32::new(room as u32),
            ..Default::default()
        };
        let mut bytes = head.as_bytes().to_vec();
        bytes.resize(bytes.len() + room * ENTRY, 0);
        let mut pages = Pages::of(&bytes);
        // SAFETY: the kernel writes the structure and at most as many entries as there is room for, all in `pages`.
        unsafe {
            on_vm(
                vm,
                Call::TdxCapabilities,
                uapi::CAPABILITIES,
                pages.address(),
            )
        }?;
        pages.copy_to(&mut bytes);
        let parsed = TdxCapabilities::read_from_prefix(&bytes);
        let Ok((head, rest)) = parsed else {
            return Err(Error::Invalid(Field::BufferLength, bytes.len() as u64).into());
        };
        let count = (head.nent.get() as usize).min(room);
        let masks = rest.chunks_exact(ENTRY).take(count);
        Ok(Self {
            attributes: head.supported_attrs.get(),
            xfam: head.supported_xfam.get(),
            masks: masks
                .filter_map(|entry| CpuidEntry2::read_from_bytes(entry).ok())
                .collect(),
        })
    }
}

/// The structure of INIT_VM.
///
/// The CPUID values are the embedder's if it gives some, else those that KVM supports, as far as they are the host's to
/// choose.
///
/// # Errors
/// [`Error::Invalid`] names the bits of ATTRIBUTES or XFAM that this host does not support.
pub(super) fn init_vm(
    params: &TdParams,
    capabilities: &Capabilities,
    supported: &CpuId,
) -> Result<Pages> {
    let beyond = |field, bits: u64, supported: u64| match bits & !supported {
        0 => Ok(()),
        more => Err(Error::Invalid(field, more)),
    };
    beyond(
        Field::TdAttributes,
        params.attributes,
        capabilities.attributes,
    )?;
    beyond(Field::Xfam, params.xfam, capabilities.xfam)?;
    let entries = entries(params, &capabilities.masks, supported.as_slice());
    let head = TdxInitVm {
        attributes: U64::new(params.attributes),
        xfam: U64::new(params.xfam),
        mrconfigid: params.mrconfigid,
        mrowner: params.mrowner,
        mrownerconfig: params.mrownerconfig,
        nent: U32::new(entries.len() as u32),
        ..Default::default()
    };
    let mut bytes = head.as_bytes().to_vec();
    bytes.extend_from_slice(entries.as_bytes());
    Ok(Pages::of(&bytes))
}

fn entries(
    params: &TdParams,
    masks: &[CpuidEntry2],
    supported: &[kvm_cpuid_entry2],
) -> Vec<CpuidEntry2> {
    let mut entries: Vec<CpuidEntry2> = match params.cpuid.as_slice() {
        [] => masks.iter().map(|mask| masked(mask, supported)).collect(),
        given => given.iter().map(of_entry).collect(),
    };
    if !entries
        .iter()
        .any(|entry| entry.function.get() == ADDRESSES)
    {
        entries.push(CpuidEntry2 {
            function: U32::new(ADDRESSES),
            ..Default::default()
        });
    }
    let width = match params.gpaw {
        Gpaw::Bits48 => 48,
        Gpaw::Bits52 => 52,
    };
    for entry in entries
        .iter_mut()
        .filter(|entry| entry.function.get() == ADDRESSES)
    {
        entry.eax = U32::new(entry.eax.get() & !WIDTH | width << 16);
    }
    entries
}

/// The supported values of a leaf, as far as the mask goes.
fn masked(mask: &CpuidEntry2, supported: &[kvm_cpuid_entry2]) -> CpuidEntry2 {
    let indexed = mask.flags.get() & CPUID_FLAG_SIGNIFICANT_INDEX != 0;
    let known = supported.iter().find(|entry| {
        entry.function == mask.function.get() && (!indexed || entry.index == mask.index.get())
    });
    let [eax, ebx, ecx, edx] = known.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
    CpuidEntry2 {
        eax: U32::new(mask.eax.get() & eax),
        ebx: U32::new(mask.ebx.get() & ebx),
        ecx: U32::new(mask.ecx.get() & ecx),
        edx: U32::new(mask.edx.get() & edx),
        ..*mask
    }
}

fn of_entry(entry: &CpuidEntry) -> CpuidEntry2 {
    let [eax, ebx, ecx, edx] = entry.regs.map(U32::new);
    CpuidEntry2 {
        function: U32::new(entry.leaf),
        index: U32::new(entry.subleaf),
        flags: U32::new(match entry.subleaf_significant {
            true => CPUID_FLAG_SIGNIFICANT_INDEX,
            false => 0,
        }),
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(leaf: u32, subleaf: Option<u32>, eax: u32) -> CpuidEntry2 {
        CpuidEntry2 {
            function: U32::new(leaf),
            index: U32::new(subleaf.unwrap_or(0)),
            flags: U32::new(subleaf.map_or(0, |_| CPUID_FLAG_SIGNIFICANT_INDEX)),
            eax: U32::new(eax),
            ..Default::default()
        }
    }

    fn supported(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        }
    }

    fn eax_of(entries: &[CpuidEntry2]) -> Vec<(u32, u32, u32)> {
        entries
            .iter()
            .map(|entry| (entry.function.get(), entry.index.get(), entry.eax.get()))
            .collect()
    }

    #[test]
    fn values_are_the_supported_ones_within_the_masks_and_the_width_is_the_tds() {
        let masks = [
            mask(1, None, 0x0f),
            mask(4, Some(2), 0xff),
            mask(9, None, 0xff),
            mask(ADDRESSES, None, WIDTH | 0xff),
        ];
        let host = [
            supported(1, 0, 0x1234),
            supported(4, 0, 0x11),
            supported(4, 2, 0x22),
            supported(ADDRESSES, 0, 0x3934),
        ];
        let params = TdParams::default();
        assert_eq!(
            eax_of(&entries(&params, &masks, &host)),
            [
                (1, 0, 0x04),
                (4, 2, 0x22),
                (9, 0, 0),
                (ADDRESSES, 0, 0x30_0034)
            ]
        );
        let wide = TdParams {
            gpaw: Gpaw::Bits52,
            ..TdParams::default()
        };
        let last = eax_of(&entries(&wide, &masks, &host))[3];
        assert_eq!(last, (ADDRESSES, 0, 0x34_0034));
        assert_eq!(
            eax_of(&entries(&wide, &[], &host)),
            [(ADDRESSES, 0, 0x34_0000)]
        );
    }

    #[test]
    fn values_of_the_embedder_are_passed_as_they_are() {
        let params = TdParams {
            cpuid: vec![CpuidEntry {
                leaf: 4,
                subleaf: 3,
                subleaf_significant: true,
                regs: [1, 2, 3, 4],
            }],
            ..TdParams::default()
        };
        let entries = entries(&params, &[mask(1, None, 0xff)], &[supported(1, 0, 7)]);
        assert_eq!(eax_of(&entries), [(4, 3, 1), (ADDRESSES, 0, 0x30_0000)]);
        assert_eq!(entries[0].edx.get(), 4);
    }

    #[test]
    fn bits_that_the_host_does_not_support_are_named() {
        let capabilities = Capabilities {
            attributes: 1 << 28,
            xfam: 0b111,
            masks: Vec::new(),
        };
        let cpuid = CpuId::new(0).unwrap();
        let with = |attributes, xfam| {
            let params = TdParams {
                attributes,
                xfam,
                ..TdParams::default()
            };
            init_vm(&params, &capabilities, &cpuid).map(drop)
        };
        assert_eq!(with(1 << 28, 0b11), Ok(()));
        assert_eq!(
            with(1 << 28 | 1, 0b11),
            Err(Error::Invalid(Field::TdAttributes, 1))
        );
        assert_eq!(with(0, 0b1011), Err(Error::Invalid(Field::Xfam, 0b1000)));
    }
}
