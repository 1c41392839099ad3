//! TDs: the launch in the kernel's order.
//!
//! | | |
//! |---|---|
//! | `init` | EXIT_HYPERCALL, the TSC's frequency, CAPABILITIES, INIT_VM |
//! | each vCPU | after its CPUID: INIT_VCPU |
//! | each page | INIT_MEM_REGION, on the first vCPU |
//! | `finalize` | FINALIZE_VM |

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ops::{
    Call, EncCmd, EncParams, Error, Field, Gpaw, HeldFailure, InitialPage, InitialPageKind,
    Measurement, Result, SharedMask, TdParams, VmParams,
};
use kvm_ops_uapi::tdx::{self as uapi, TdxCmd, TdxInitMemRegion};
use kvm_ops_uapi::{U32, U64};

use super::blobs::Pages;
use super::capabilities::{Capabilities, init_vm};
use super::{Technology, enable_map_gpa, refused};
use crate::{KvmVcpu, KvmVm, sys};

/// More tries than signals that a launch meets, or moments in which the module is busy.
const TRIES: u32 = 64;

/// The launch of a TD.
pub(super) struct TdGuest {
    params: TdParams,
    /// False for the parameters that a TD has if none are given: its TSC runs as the host's then.
    given: bool,
    finalized: AtomicBool,
}

impl TdGuest {
    pub(super) fn new(params: &VmParams) -> Result<Self> {
        let (params, given) = match &params.enc {
            EncParams::Default => (TdParams::default(), false),
            EncParams::Td(td) => ((**td).clone(), true),
            _ => return Err(Error::Invalid(Field::TdAttributes, 0)),
        };
        Ok(Self {
            params,
            given,
            finalized: AtomicBool::new(false),
        })
    }

    /// The first vCPU: commands about pages go to its file.
    fn vcpu<'a>(&self, vm: &'a KvmVm) -> Result<&'a OwnedFd> {
        vm.first_vcpu().ok_or(Error::Invalid(Field::VcpuCount, 0))
    }
}

impl Technology for TdGuest {
    fn init(&self, vm: &KvmVm) -> Result<SharedMask, HeldFailure> {
        enable_map_gpa(vm)?;
        if self.given {
            sys::set_vm_tsc_khz(vm.fd(), self.params.tsc_khz)?;
        }
        let capabilities = Capabilities::of(vm)?;
        let mut args = init_vm(&self.params, &capabilities, vm.host().supported_cpuid())?;
        // SAFETY: the kernel reads the structure with as many entries as it says, all of them in `args`.
        unsafe { on_vm(vm, Call::TdxInitVm, uapi::INIT_VM, args.address()) }?;
        let bit = match self.params.gpaw {
            Gpaw::Bits48 => 47,
            Gpaw::Bits52 => 51,
        };
        let mask = SharedMask::shared_bit(bit);
        Ok(mask.ok_or(Error::Invalid(Field::Gpaw, bit.into()))?)
    }

    /// INIT_VCPU, with 0 in RCX and R8, as `TdxVm` starts its vCPUs.
    fn vcpu_created(&self, vcpu: &KvmVcpu) -> Result<()> {
        const RCX: u64 = 0;
        // SAFETY: the command has a value and no address.
        let done = unsafe {
            issue(Call::TdxInitVcpu, (uapi::INIT_VCPU, 0), RCX, |cmd| {
                sys::vcpu_encrypt_op(vcpu.fd(), cmd)
            })
        };
        done.map_err(|failure| failure.error)
    }

    fn add_page(&self, vm: &KvmVm, page: &InitialPage<'_>) -> Result<(), HeldFailure> {
        let flags = match page.kind {
            InitialPageKind::Measured => uapi::MEASURE_MEMORY_REGION,
            InitialPageKind::Unmeasured => 0,
            _ => {
                let refused =
                    kvm_ops::not_offered!("add_initial_page of a kind that TDX does not know");
                return refused.map_err(HeldFailure::from);
            }
        };
        let vcpu = self.vcpu(vm)?;
        let mut source = Pages::of(page.contents);
        let mut region = TdxInitMemRegion {
            source_addr: U64::new(source.address()),
            gpa: U64::new(page.gpa.get()),
            nr_pages: U64::new(1),
        };
        let data = (&raw mut region).expose_provenance() as u64;
        // SAFETY: the kernel reads and writes the structure, and reads the page that it names; both live until the
        // call is over.
        unsafe {
            issue(
                Call::TdxInitMemRegion,
                (uapi::INIT_MEM_REGION, flags),
                data,
                |cmd| sys::vcpu_encrypt_op(vcpu, cmd),
            )
        }
    }

    fn finalize(&self, vm: &KvmVm) -> Result<(), HeldFailure> {
        self.vcpu(vm)?;
        // SAFETY: the command has no structure.
        unsafe { on_vm(vm, Call::TdxFinalizeVm, uapi::FINALIZE_VM, 0) }?;
        self.finalized.store(true, Ordering::Release);
        Ok(())
    }

    fn is_final(&self) -> bool {
        self.finalized.load(Ordering::Acquire)
    }

    /// The registers of a TD are never the host's: KVM gives TDs no DEBUG attribute.
    fn is_protected(&self) -> bool {
        true
    }

    fn measurement(&self) -> Result<Option<Measurement>> {
        kvm_ops::not_offered!("measurement, which a TD asks the module for,")
    }

    /// Every step of a launch is an operation of its own, and the kernel has no other command.
    fn command(&self, _vm: &KvmVm, cmd: &mut EncCmd<'_>) -> Result<(), HeldFailure> {
        cmd.firmware_status = 0;
        Err(super::not_passed_on().into())
    }
}

/// Issues a command on the VM's file.
///
/// # Safety
/// As [`issue`].
pub(super) unsafe fn on_vm(vm: &KvmVm, call: Call, id: u32, data: u64) -> Result<(), HeldFailure> {
    // SAFETY: the caller's promise.
    unsafe {
        issue(call, (id, 0), data, |cmd| {
            // SAFETY: `cmd` is the structure of the ioctl; the caller of `on_vm` answers for what it points to.
            let done = vm.fd().encrypt_op(cmd);
            done.map_err(|error| error.errno())
        })
    }
}

/// Issues a command by `ioctl`, which answers with an errno, again after a signal and while the module is busy.
///
/// # Safety
/// `data` is the command's value, or the address of its structure, which the kernel may read and write with all that
/// it points to.
unsafe fn issue(
    call: Call,
    (id, flags): (u32, u32),
    data: u64,
    ioctl: impl Fn(*mut TdxCmd) -> Result<(), i32>,
) -> Result<(), HeldFailure> {
    let mut tries = TRIES;
    loop {
        let mut cmd = TdxCmd {
            id: U32::new(id),
            flags: U32::new(flags),
            data: U64::new(data),
            ..Default::default()
        };
        let done = ioctl(&raw mut cmd);
        tracing::trace!(command = %call, ok = done.is_ok(), "KVM_MEMORY_ENCRYPT_OP");
        match done {
            Ok(()) => return Ok(()),
            // INIT_VM says EBUSY of a vCPU that exists, or of a limit: neither passes.
            Err(libc::EINTR) if tries > 0 => tries -= 1,
            Err(libc::EBUSY) if tries > 0 && call != Call::TdxInitVm => {
                tries -= 1;
                std::thread::yield_now();
            }
            Err(errno) => return Err(refused::by_module(call, errno, cmd.hw_error.get())),
        }
    }
}
