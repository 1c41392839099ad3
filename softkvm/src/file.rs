//! Open files, and the ioctls that every file begins with.

use std::fmt;
use std::sync::Arc;

use kvm_ops_uapi::checks::any;
use kvm_ops_uapi::ioctl::{Ioctl, KVMIO};

use crate::psp::{self, SevDevice};
use crate::refusal::{Result, ensure};
use crate::stats::StatsFile;
use crate::tape::Played;
use crate::vcpu::Vcpu;
use crate::vm::{Gmem, Vm, gmem};
use crate::{Kernel, Process, Refusal, RunArea, system, vcpu, vm};

/// An open file of KVM's or of `/dev/sev`. A clone is another reference to the same open file, as
/// `dup` makes one.
///
/// The VM file, vCPU files, guest_memfds and statistics files keep their VM; it ends with the last of them, in
/// whatever order they are closed.
#[derive(Clone)]
pub struct File(Kind);

#[derive(Clone)]
enum Kind {
    System(Arc<Kernel>),
    Vm(Arc<VmFile>),
    Vcpu(Arc<VcpuFile>),
    Gmem(Arc<Gmem>),
    Sev(Arc<SevDevice>),
    Stats(Arc<StatsFile>),
    Played(Arc<Played>),
}

/// A VM file.
struct VmFile {
    vm: Arc<Vm>,
}

/// A vCPU file.
pub(crate) struct VcpuFile {
    pub(crate) vm: Arc<Vm>,
    pub(crate) vcpu: Arc<Vcpu>,
}

/// The kind of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// `/dev/kvm`.
    System,
    /// From `KVM_CREATE_VM`.
    Vm,
    /// From `KVM_CREATE_VCPU`.
    Vcpu,
    /// From `KVM_CREATE_GUEST_MEMFD`.
    GuestMemfd,
    /// `/dev/sev`.
    Sev,
    /// From `KVM_GET_STATS_FD`.
    Stats,
}

impl File {
    pub(crate) fn system(kernel: Kernel) -> Self {
        Self(Kind::System(Arc::new(kernel)))
    }

    pub(crate) fn sev(kernel: Kernel, writable: bool) -> Self {
        Self(Kind::Sev(Arc::new(SevDevice { kernel, writable })))
    }

    pub(crate) fn vm(vm: Arc<Vm>) -> Self {
        Self(Kind::Vm(Arc::new(VmFile { vm })))
    }

    pub(crate) fn vcpu(vm: Arc<Vm>, vcpu: Arc<Vcpu>) -> Self {
        Self(Kind::Vcpu(Arc::new(VcpuFile { vm, vcpu })))
    }

    pub(crate) fn gmem(gmem: Arc<Gmem>) -> Self {
        Self(Kind::Gmem(gmem))
    }

    pub(crate) fn stats(file: Arc<StatsFile>) -> Self {
        Self(Kind::Stats(file))
    }

    pub(crate) fn played(file: Played) -> Self {
        Self(Kind::Played(Arc::new(file)))
    }

    pub(crate) fn as_played(&self) -> Option<&Played> {
        match &self.0 {
            Kind::Played(file) => Some(file),
            _ => None,
        }
    }

    /// A number that no other open file has at the same time.
    pub(crate) fn identity(&self) -> usize {
        match &self.0 {
            Kind::System(file) => Arc::as_ptr(file).addr(),
            Kind::Vm(file) => Arc::as_ptr(file).addr(),
            Kind::Vcpu(file) => Arc::as_ptr(file).addr(),
            Kind::Gmem(file) => Arc::as_ptr(file).addr(),
            Kind::Sev(file) => Arc::as_ptr(file).addr(),
            Kind::Stats(file) => Arc::as_ptr(file).addr(),
            Kind::Played(file) => Arc::as_ptr(file).addr(),
        }
    }

    pub(crate) fn as_vm(&self) -> Option<&Arc<Vm>> {
        match &self.0 {
            Kind::Vm(file) => Some(&file.vm),
            _ => None,
        }
    }

    pub(crate) fn as_gmem(&self) -> Option<&Arc<Gmem>> {
        match &self.0 {
            Kind::Gmem(file) => Some(file),
            _ => None,
        }
    }

    /// The kind of the file.
    pub fn kind(&self) -> FileKind {
        match &self.0 {
            Kind::System(_) => FileKind::System,
            Kind::Vm(_) => FileKind::Vm,
            Kind::Vcpu(_) => FileKind::Vcpu,
            Kind::Gmem(_) => FileKind::GuestMemfd,
            Kind::Sev(_) => FileKind::Sev,
            Kind::Stats(_) => FileKind::Stats,
            Kind::Played(file) => file.kind(),
        }
    }

    /// True for two references to one open file.
    pub fn is_same(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }

    /// Answers an ioctl. Bits of the number above the lower 32 are dropped by the caller.
    ///
    /// # Errors
    /// The kernel's errno, with the check that failed; the errno of a fault that was [injected](crate::Faults).
    pub fn ioctl(&self, process: &dyn Process, number: u32, argument: u64) -> Result<i64, Refusal> {
        if let Kind::Played(file) = &self.0 {
            return file.ioctl(process, number, argument);
        }
        let serve = |process: &dyn Process| self.serve(process, number, argument);
        match self.kernel().and_then(Kernel::recorder) {
            Some(recorder) => recorder.ioctl(self, process, (number, argument), serve),
            None => serve(process),
        }
    }

    fn serve(&self, process: &dyn Process, number: u32, argument: u64) -> Result<i64> {
        let ioctl = Ioctl::from_number(number);
        if let Some(kernel) = self.kernel() {
            kernel.faults().check(process, ioctl, argument)?;
        }
        match &self.0 {
            Kind::System(kernel) => system::ioctl(kernel, process, ioctl, argument),
            Kind::Vm(file) => {
                check_caller(&file.vm, process)?;
                vm::ioctl(&file.vm, process, ioctl, argument)
            }
            Kind::Vcpu(file) => {
                check_caller(&file.vm, process)?;
                ensure((number >> 8) as u8 == KVMIO, any::VCPU_TYPE)?;
                vcpu::ioctl(file, process, ioctl, argument)
            }
            Kind::Gmem(_) | Kind::Stats(_) | Kind::Played(_) => Err(any::KNOWN_ON_GMEM.into()),
            Kind::Sev(device) => psp::ioctl(device, process, ioctl, argument),
        }
    }

    /// The kernel behind a file that has ioctls.
    fn kernel(&self) -> Option<&Kernel> {
        match &self.0 {
            Kind::System(kernel) => Some(kernel),
            Kind::Sev(device) => Some(&device.kernel),
            Kind::Vm(file) => Some(file.vm.kernel()),
            Kind::Vcpu(file) => Some(file.vm.kernel()),
            Kind::Gmem(_) | Kind::Stats(_) | Kind::Played(_) => None,
        }
    }

    /// Checks `mmap` of a guest_memfd.
    ///
    /// # Errors
    /// ENODEV for a file that cannot be mapped, and for files of other kinds but vCPUs; EINVAL for a
    /// mapping that is not shared.
    pub fn check_mmap(&self, shared: bool) -> Result<(), Refusal> {
        if self.kind() == FileKind::Vcpu {
            return Ok(());
        }
        let (_, flags) = self.guest_memfd().ok_or(kvm_ops_uapi::Errno::ENODEV)?;
        gmem::check_mmap(flags, shared)
    }

    /// Checks `fallocate` of a guest_memfd, whose pages are the caller's to free.
    ///
    /// # Errors
    /// The kernel's errno; ENODEV for files of other kinds.
    pub fn check_fallocate(&self, mode: i32, offset: i64, len: i64) -> Result<(), Refusal> {
        if let Kind::Gmem(gmem) = &self.0 {
            return gmem.check_fallocate(mode, offset, len);
        }
        let (size, _) = self.guest_memfd().ok_or(kvm_ops_uapi::Errno::ENODEV)?;
        gmem::check_fallocate(size, mode, offset, len)
    }

    /// Reads a statistics file: up to `len` bytes from `offset` on, or, without one, from the file's position, which
    /// moves on. No bytes are the end.
    ///
    /// # Errors
    /// EINVAL for files of other kinds, which have no contents.
    pub fn read(&self, offset: Option<u64>, len: usize) -> Result<Vec<u8>, Refusal> {
        match &self.0 {
            Kind::Stats(file) => Ok(file.read(offset, len)),
            _ => Err(kvm_ops_uapi::Errno::EINVAL.into()),
        }
    }

    /// The size of a guest_memfd, and its flags.
    pub fn guest_memfd(&self) -> Option<(u64, u64)> {
        if let Kind::Played(file) = &self.0 {
            return file.guest_memfd();
        }
        self.as_gmem().map(|gmem| (gmem.size(), gmem.flags()))
    }

    /// The memory that a vCPU's file offers to `mmap`.
    pub fn run_area(&self) -> Option<&Arc<dyn RunArea>> {
        match &self.0 {
            Kind::Vcpu(file) => Some(file.vcpu.run_area()),
            Kind::Played(file) => file.run_area(),
            _ => None,
        }
    }
}

/// The start of every ioctl on a file of a VM.
fn check_caller(vm: &Vm, process: &dyn Process) -> Result<()> {
    ensure(vm.creator() == process.address_space(), any::CREATOR)?;
    ensure(!vm.is_dead(), any::ALIVE)
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "File({:?})", self.kind())
    }
}
