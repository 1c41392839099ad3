//! The ioctls that kvm-ioctls does not wrap.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr,
    kvm_interrupt, kvm_memory_attributes, kvm_pre_fault_memory, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use kvm_ops::{Call, Result};
use kvm_ops_uapi::tdx::TdxCmd;
use vmm_sys_util::ioctl::{
    ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::error::from_errno;

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_io_nr!(KVM_SET_TSC_KHZ, KVMIO, 0xa2);
ioctl_iowr_nr!(KVM_MEMORY_ENCRYPT_OP, KVMIO, 0xba, std::ffi::c_ulong);
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

// The sizes are part of the ioctl numbers (Linux include/uapi/linux/kvm.h).
static_assertions::assert_eq_size!(kvm_interrupt, u32);
static_assertions::assert_eq_size!(kvm_device_attr, [u64; 3]);
static_assertions::assert_eq_size!(kvm_xsave, [u8; XSAVE_BYTES]);
static_assertions::assert_eq_size!(kvm_pre_fault_memory, [u64; 8]);

/// Bytes of an XSAVE area without the components that a process asks for (AMX).
pub(crate) const XSAVE_BYTES: usize = 4096;

fn done(call: Call, ret: i32) -> Result<()> {
    if ret >= 0 {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error().raw_os_error();
    Err(from_errno(call, errno.unwrap_or(0)))
}

/// Queues an external interrupt (`KVM_INTERRUPT`).
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<()> {
    let irq = kvm_interrupt { irq: vector.into() };
    // SAFETY: the kernel reads the four bytes of `irq`.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &irq) };
    done(Call::Interrupt, ret)
}

/// Gives the vCPU machine-check banks (`KVM_X86_SETUP_MCE`).
pub(crate) fn setup_mce(vcpu: &VcpuFd, mcg_cap: u64) -> Result<()> {
    // SAFETY: the kernel reads the eight bytes of `mcg_cap`.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &mcg_cap) };
    done(Call::SetupMce, ret)
}

/// Reads extended state. `area` has the vCPU's length: `KVM_CAP_XSAVE2`, or [`XSAVE_BYTES`] on a
/// kernel without it.
pub(crate) fn get_xsave(vcpu: &VcpuFd, area: &mut [u8]) -> Result<()> {
    assert!(area.len() >= XSAVE_BYTES);
    let request = match area.len() {
        XSAVE_BYTES => KVM_GET_XSAVE(),
        _ => KVM_GET_XSAVE2(),
    };
    // SAFETY: KVM_GET_XSAVE writes `XSAVE_BYTES`, and KVM_GET_XSAVE2 as many bytes as
    // KVM_CAP_XSAVE2 answered, which is the length of the area.
    let ret = unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) };
    done(Call::Fpu, ret)
}

/// Writes extended state; `bytes` is the vCPU's length, as for [`get_xsave`].
pub(crate) fn set_xsave(vcpu: &VcpuFd, area: &[u8], bytes: usize) -> Result<()> {
    assert!(area.len() >= bytes);
    // SAFETY: the kernel reads `bytes`, as KVM_CAP_XSAVE2 answered or KVM_SET_XSAVE has it.
    let ret = unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), area.as_ptr()) };
    done(Call::Fpu, ret)
}

/// Sets the TSC offset (`KVM_VCPU_TSC_OFFSET` of Linux Documentation/virt/kvm/devices/vcpu.rst).
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<()> {
    let attr = tsc_offset_at(&raw const offset);
    // SAFETY: the kernel reads `attr`, and the eight bytes of `offset` that it points to, before
    // the call returns; both live until then.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) };
    done(Call::SetDeviceAttr, ret)
}

/// Reads the TSC offset.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64> {
    let mut offset = 0_u64;
    let attr = tsc_offset_at(&raw mut offset);
    // SAFETY: the kernel reads `attr` and writes the eight bytes of `offset` that it points to,
    // before the call returns; both live until then. The pointer is made from a mutable borrow.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) };
    done(Call::SetDeviceAttr, ret)?;
    Ok(offset)
}

fn tsc_offset_at(value: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value.expose_provenance() as u64,
        flags: 0,
    }
}

/// Marks a range as private or takes that mark away (`KVM_SET_MEMORY_ATTRIBUTES`).
pub(crate) fn set_attributes(vm: &VmFd, gpa: u64, bytes: u64, private: bool) -> Result<()> {
    let request = kvm_memory_attributes {
        address: gpa,
        size: bytes,
        attributes: match private {
            true => KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
            false => 0,
        },
        flags: 0,
    };
    vm.set_memory_attributes(request)
        .map_err(|error| from_errno(Call::SetMemoryAttributes, error.errno()))
}

/// Sets the frequency that the TSC of a VM's vCPUs starts with.
pub(crate) fn set_vm_tsc_khz(vm: &VmFd, khz: u32) -> Result<()> {
    // SAFETY: the call takes a value.
    let ret = unsafe { ioctl_with_val(vm, KVM_SET_TSC_KHZ(), khz.into()) };
    done(Call::SetTscKhz, ret)
}

/// Issues a command of TDX on a vCPU (`KVM_MEMORY_ENCRYPT_OP`), which kvm-ioctls has for VMs only. Returns its errno.
///
/// # Safety
/// `cmd` points to the command, in which a value or the address of the command's structure is. The kernel may read and
/// write that, with all that it points to.
pub(crate) unsafe fn vcpu_encrypt_op(
    vcpu: &impl AsRawFd,
    cmd: *mut TdxCmd,
) -> std::result::Result<(), i32> {
    // SAFETY: the caller's promise.
    match unsafe { ioctl_with_mut_ptr(vcpu, KVM_MEMORY_ENCRYPT_OP(), cmd) } {
        0.. => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
    }
}

/// Maps pages before the guest touches them (`KVM_PRE_FAULT_MEMORY`). Returns the bytes that are left, because a
/// failure after the first page is a success.
pub(crate) fn pre_fault(vcpu: &impl AsRawFd, gpa: u64, bytes: u64) -> Result<u64> {
    let mut range = kvm_pre_fault_memory {
        gpa,
        size: bytes,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `range`, which has the size in the ioctl's number.
    let ret = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) };
    done(Call::PreFaultMemory, ret)?;
    Ok(range.size)
}
