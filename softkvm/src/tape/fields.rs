//! The fields of structures that mean something else in each run of a program: addresses, descriptors and times.

use std::mem::offset_of;

use kvm_ops_uapi::cap;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::irq::{IoEventFd, Irqfd};
use kvm_ops_uapi::irqchip::{PitChannelState, PitState2};
use kvm_ops_uapi::memory::{
    ClearDirtyLog, DirtyLog, UserspaceMemoryRegion, UserspaceMemoryRegion2,
};
use kvm_ops_uapi::psp::{self, Blob, IssueCmd, PdhCertExport, PekCertImport, SnpVlekLoad};
use kvm_ops_uapi::sev::{
    self, EncRegion, SevAttestation, SevCmd, SevDbg, SevLaunchSecret, SevLaunchStart, SevRange,
    SevReceiveStart, SevSendStart, SevUpdateData, SnpLaunchFinish, SnpLaunchUpdate,
};
use kvm_ops_uapi::state::OneReg;
use kvm_ops_uapi::system::DeviceAttr;
use kvm_ops_uapi::tdx::{self, TdxCmd, TdxInitMemRegion};
use kvm_ops_uapi::vm::{EnableCap, MsrFilter, MsrFilterRange};

use zerocopy::IntoBytes;

use super::format::Vendor;
use crate::Process;

/// A field that means something else in each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// An address of eight bytes, at this offset.
    Address(usize),
    /// A descriptor of four bytes.
    Descriptor(usize),
    /// A time of the host of eight bytes, which the kernel does not use.
    Time(usize),
}

use Field::{Address, Descriptor, Time};

macro_rules! addresses {
    ($structure:ident: $($field:ident)*) => {
        vec![$(Address(offset_of!($structure, $field))),*]
    };
}

/// The fields of a SEV command's structure.
fn of_sev(id: u32) -> Vec<Field> {
    match id {
        sev::LAUNCH_START => addresses!(SevLaunchStart: dh session),
        sev::LAUNCH_UPDATE_DATA | sev::LAUNCH_MEASURE => addresses!(SevRange: uaddr),
        sev::LAUNCH_SECRET => addresses!(SevLaunchSecret: hdr guest trans),
        sev::SEND_START => addresses!(SevSendStart: pdh_cert plat_certs amd_certs session),
        sev::SEND_UPDATE_DATA | sev::RECEIVE_UPDATE_DATA => {
            addresses!(SevUpdateData: hdr guest trans)
        }
        sev::RECEIVE_START => addresses!(SevReceiveStart: pdh session),
        sev::DBG_DECRYPT | sev::DBG_ENCRYPT => addresses!(SevDbg: src dst),
        sev::GET_ATTESTATION_REPORT => addresses!(SevAttestation: uaddr),
        sev::SNP_LAUNCH_UPDATE => addresses!(SnpLaunchUpdate: uaddr),
        sev::SNP_LAUNCH_FINISH => addresses!(SnpLaunchFinish: id_block id_auth),
        _ => Vec::new(),
    }
}

/// The fields of the structure of a command of `/dev/sev`.
fn of_device(id: u32) -> Vec<Field> {
    match id {
        psp::PEK_CSR | psp::GET_ID2 => addresses!(Blob: address),
        psp::PEK_CERT_IMPORT => addresses!(PekCertImport: pek_cert oca_cert),
        psp::PDH_CERT_EXPORT => addresses!(PdhCertExport: pdh_cert cert_chain),
        psp::SNP_VLEK_LOAD => addresses!(SnpVlekLoad: vlek_wrapped),
        _ => Vec::new(),
    }
}

/// The fields of the structure of a TDX command.
fn of_tdx(id: u32) -> Vec<Field> {
    match id {
        tdx::INIT_MEM_REGION => addresses!(TdxInitMemRegion: source_addr),
        _ => Vec::new(),
    }
}

/// The fields of a command that the argument's structure names by its first four bytes, in a call that has commands.
pub(super) fn of_command(vendor: Vendor, number: u32, id: u32) -> Vec<Field> {
    let ioctl = Ioctl::from_number(number);
    match vendor {
        _ if ioctl == Some(ioctl::SEV_ISSUE_CMD) => of_device(id),
        _ if ioctl != Some(ioctl::KVM_MEMORY_ENCRYPT_OP) => Vec::new(),
        Vendor::Amd => of_sev(id),
        Vendor::Intel => of_tdx(id),
    }
}

/// The fields of the structure that the argument points to.
pub(super) fn of_argument(vendor: Vendor, number: u32, id: u32) -> Vec<Field> {
    const ARGUMENT: usize = offset_of!(EnableCap, args);
    let is = |ioctl: Ioctl| ioctl.number() == number;
    match Ioctl::from_number(number) {
        _ if is(ioctl::KVM_SET_USER_MEMORY_REGION) => {
            addresses!(UserspaceMemoryRegion: userspace_addr)
        }
        _ if is(ioctl::KVM_SET_USER_MEMORY_REGION2) => vec![
            Address(offset_of!(UserspaceMemoryRegion2, userspace_addr)),
            Descriptor(offset_of!(UserspaceMemoryRegion2, guest_memfd)),
        ],
        _ if is(ioctl::KVM_MEMORY_ENCRYPT_OP) => match vendor {
            Vendor::Amd => vec![
                Address(offset_of!(SevCmd, data)),
                Descriptor(offset_of!(SevCmd, sev_fd)),
            ],
            // The value of RCX.
            Vendor::Intel if id == tdx::INIT_VCPU => Vec::new(),
            Vendor::Intel => addresses!(TdxCmd: data),
        },
        _ if is(ioctl::SEV_ISSUE_CMD) => addresses!(IssueCmd: data),
        _ if is(ioctl::KVM_MEMORY_ENCRYPT_REG_REGION)
            || is(ioctl::KVM_MEMORY_ENCRYPT_UNREG_REGION) =>
        {
            addresses!(EncRegion: addr)
        }
        _ if is(ioctl::KVM_GET_DIRTY_LOG) => addresses!(DirtyLog: dirty_bitmap),
        _ if is(ioctl::KVM_CLEAR_DIRTY_LOG) => addresses!(ClearDirtyLog: dirty_bitmap),
        _ if is(ioctl::KVM_SET_DEVICE_ATTR)
            || is(ioctl::KVM_GET_DEVICE_ATTR)
            || is(ioctl::KVM_HAS_DEVICE_ATTR) =>
        {
            addresses!(DeviceAttr: addr)
        }
        _ if is(ioctl::KVM_GET_ONE_REG) || is(ioctl::KVM_SET_ONE_REG) => {
            addresses!(OneReg: addr)
        }
        _ if is(ioctl::KVM_IRQFD) => vec![
            Descriptor(offset_of!(Irqfd, fd)),
            Descriptor(offset_of!(Irqfd, resamplefd)),
        ],
        _ if is(ioctl::KVM_IOEVENTFD) => vec![Descriptor(offset_of!(IoEventFd, fd))],
        _ if is(ioctl::KVM_SET_PIT2) => {
            let first =
                offset_of!(PitState2, channels) + offset_of!(PitChannelState, count_load_time);
            let channels = (0..3).map(|n| first + n * size_of::<PitChannelState>());
            channels.map(Time).collect()
        }
        _ if is(ioctl::KVM_X86_SET_MSR_FILTER) => {
            let first = offset_of!(MsrFilter, ranges) + offset_of!(MsrFilterRange, bitmap);
            let ranges = (0..16).map(|n| first + n * size_of::<MsrFilterRange>());
            ranges.map(Address).collect()
        }
        _ if is(ioctl::KVM_ENABLE_CAP)
            && [cap::VM_MOVE_ENC_CONTEXT_FROM, cap::VM_COPY_ENC_CONTEXT_FROM].contains(&id) =>
        {
            vec![Descriptor(ARGUMENT)]
        }
        _ => Vec::new(),
    }
}

/// True for a call whose argument is an address.
pub(super) const fn takes_address(number: u32) -> bool {
    number >> 30 != 0
}

/// The slot that a call has set: its number, address and bytes, which are 0 where it was deleted. `None` for other calls. The
/// two structures begin alike.
pub(super) fn slot_set(
    process: &dyn Process,
    (number, argument): (u32, u64),
) -> Option<(u32, u64, u64)> {
    let sets = [
        ioctl::KVM_SET_USER_MEMORY_REGION,
        ioctl::KVM_SET_USER_MEMORY_REGION2,
    ];
    sets.iter().find(|ioctl| ioctl.number() == number)?;
    let mut region = UserspaceMemoryRegion::default();
    process.read(argument, region.as_mut_bytes()).ok()?;
    Some((
        region.slot.get(),
        region.userspace_addr.get(),
        region.memory_size.get(),
    ))
}
