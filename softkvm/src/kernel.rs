//! The kernel: a software machine, and what it offers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use std::{fmt, io};

use kvm_ops::moves::StagingTable;
use kvm_ops::sim::SimHost;
use kvm_ops::{Host, PspPort, SeamPort, Tech, Vendor};
use kvm_ops_uapi::system::{CpuidEntry2, vm_type};
use kvm_ops_uapi::vm::MAX_VCPUS;

use crate::system::cpuid;
use crate::tape::{self, Recorder};
use crate::vm::Vm;
use crate::{AddressSpace, Device, Faults, File, tdx};

/// A kernel with KVM, over one software machine. Clones are the same kernel.
#[derive(Clone)]
pub struct Kernel(Arc<Inner>);

struct Inner {
    host: SimHost,
    vm_types: u32,
    cpuid: Vec<CpuidEntry2>,
    td_limits: Option<tdx::Limits>,
    faults: Faults,
    vms: Mutex<Vec<Weak<Vm>>>,
    staging: Arc<StagingTable>,
    recorder: Option<Recorder>,
}

impl Kernel {
    /// A kernel on a machine. Types of VMs are those that the machine can hold.
    ///
    /// ```
    /// use kvm_ops::Vendor;
    /// use kvm_ops::sim::SimHost;
    /// use kvm_ops_softkvm::{Kernel, Task};
    /// use kvm_ops_uapi::{cap, ioctl};
    ///
    /// let kernel = Kernel::new(SimHost::new(Vendor::Amd));
    /// let task = Task::new();
    /// let kvm = task.open(kernel.open_kvm())?;
    /// let types = task.ioctl(kvm, ioctl::KVM_CHECK_EXTENSION, cap::VM_TYPES.into())?;
    /// assert_eq!(types, 0b1_1111, "normal, software-protected, SEV, SEV-ES, SNP");
    /// let vm = task.ioctl(kvm, ioctl::KVM_CREATE_VM, 4)?;
    /// task.close(vm as i32)?;
    /// # Ok::<(), kvm_ops_softkvm::Refusal>(())
    /// ```
    pub fn new(host: SimHost) -> Self {
        Self::with_faults(host, Faults::default())
    }

    /// A kernel whose calls fail where a plan says so.
    pub fn with_faults(host: SimHost, faults: Faults) -> Self {
        Self::build(host, faults, None)
    }

    /// A kernel that writes a record of each call: what it reads of the program and writes to it. A [`Player`](crate::Player)
    /// serves the program from the record.
    ///
    /// # Errors
    /// The error of the first write. Of later ones the record ends, and the program goes on.
    pub fn recording(
        host: SimHost,
        faults: Faults,
        out: Box<dyn io::Write + Send>,
    ) -> io::Result<Self> {
        let cpuid = cpuid::supported(&host, vm_types(&host));
        let recorder = tape::recorder(host.vendor(), encryption_leaf(&cpuid), out)?;
        Ok(Self::build(host, faults, Some(recorder)))
    }

    fn build(host: SimHost, faults: Faults, recorder: Option<Recorder>) -> Self {
        let mut vm_types = vm_types(&host);
        let cpuid = cpuid::supported(&host, vm_types);
        let td_limits = tdx::Limits::of(&host, &cpuid);
        vm_types |= u32::from(td_limits.is_some()) << vm_type::TDX;
        Self(Arc::new(Inner {
            host,
            vm_types,
            cpuid,
            td_limits,
            faults,
            recorder,
            vms: Mutex::default(),
            staging: Arc::default(),
        }))
    }

    pub(crate) fn recorder(&self) -> Option<&Recorder> {
        self.0.recorder.as_ref()
    }

    /// Notes in the record, if there is one, what a clock of this number told the calling thread: a time since the clock's zero.
    /// [`Player::clock`](crate::Player::clock) gives it back. Times of a thread that has not made a call yet are not noted.
    pub fn looked_at_clock(&self, clock: i32, time: Duration) {
        if let Some(recorder) = self.recorder() {
            recorder.looked(clock, time);
        }
    }

    /// Notes in the record, if there is one, that the calling thread has taken a lock of the program, and holds it. The order in
    /// which threads take a lock is part of the record from the first call of each on. The name has no blanks.
    pub fn took_lock(&self, lock: &str) {
        if let Some(recorder) = self.recorder() {
            recorder.took(lock);
        }
    }

    /// Notes that a device was opened.
    fn opened(&self, file: File, device: Device) -> File {
        if let Some(recorder) = self.recorder() {
            recorder.opened(&file, device);
        }
        file
    }

    /// The faults that its calls meet.
    pub fn faults(&self) -> &Faults {
        &self.0.faults
    }

    /// Tells that a process is about to take memory away: by `munmap`, `mprotect`, or another mapping in its place. It is
    /// what the kernel's MMU notifiers do. When this returns, no guest touches the range any more; one that comes to it asks
    /// [`Process::lend`](crate::Process::lend) again, and ends its `KVM_RUN` with EFAULT if there is nothing. Private memory
    /// of a TD or an SNP guest is not in the range and stays; what a guest of SEV or SEV-ES has there is lost, unless it is pinned.
    pub fn invalidate(&self, space: AddressSpace, address: u64, bytes: u64) {
        let vms: Vec<Arc<Vm>> = self.vms().iter().filter_map(Weak::upgrade).collect();
        for vm in vms.iter().filter(|vm| vm.creator() == space) {
            vm.invalidate(address, bytes);
        }
    }

    fn vms(&self) -> MutexGuard<'_, Vec<Weak<Vm>>> {
        self.0.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a new VM into the list of those that are told.
    pub(crate) fn register(&self, vm: &Arc<Vm>) {
        let mut vms = self.vms();
        vms.retain(|vm| vm.strong_count() != 0);
        vms.push(Arc::downgrade(vm));
    }

    /// The software machine.
    pub fn host(&self) -> &SimHost {
        &self.0.host
    }

    /// A new open file of `/dev/kvm`.
    pub fn open_kvm(&self) -> File {
        self.opened(File::system(self.clone()), Device::Kvm)
    }

    /// A new open file of `/dev/sev`, which an AMD machine has, for reading and writing.
    pub fn open_sev(&self) -> Option<File> {
        self.open_sev_as(true)
    }

    /// The same for reading, by which some of its commands are refused.
    pub fn open_sev_for_reading(&self) -> Option<File> {
        self.open_sev_as(false)
    }

    fn open_sev_as(&self, writable: bool) -> Option<File> {
        let open = || self.opened(File::sev(self.clone(), writable), Device::Sev);
        self.has_sev().then(open)
    }

    /// The types of VMs, a bit for each.
    pub fn vm_types(&self) -> u32 {
        self.0.vm_types
    }

    pub(crate) fn has_type(&self, number: u64) -> bool {
        number < 32 && self.0.vm_types >> number & 1 != 0
    }

    pub(crate) fn has_sev(&self) -> bool {
        self.has_type(vm_type::SEV) || self.has_type(vm_type::SEV_ES) || self.has_type(vm_type::SNP)
    }

    pub(crate) fn is_amd(&self) -> bool {
        self.0.host.vendor() == Vendor::Amd
    }

    pub(crate) fn td_limits(&self) -> Option<&tdx::Limits> {
        self.0.td_limits.as_ref()
    }

    /// The most vCPUs of a VM: a TD has no more than the machine has processors.
    pub(crate) fn max_vcpus(&self, kind: u64) -> u32 {
        match self.0.host.seam() {
            Some(seam) if kind == vm_type::TDX => seam.cpus().min(MAX_VCPUS),
            _ => MAX_VCPUS,
        }
    }

    /// What CPUID of the machine's processors tells of memory encryption (leaf 0x8000001f): EAX, EBX, ECX and EDX.
    /// Zeros on Intel.
    pub fn encryption_leaf(&self) -> [u32; 4] {
        encryption_leaf(&self.0.cpuid)
    }

    /// Guests that wait for another VM, each under its token.
    pub(crate) fn staging(&self) -> &Arc<StagingTable> {
        &self.0.staging
    }

    pub(crate) fn cpuid(&self) -> &[CpuidEntry2] {
        &self.0.cpuid
    }
}

fn encryption_leaf(cpuid: &[CpuidEntry2]) -> [u32; 4] {
    let mut leaves = cpuid.iter();
    let leaf = leaves.find(|leaf| leaf.function == cpuid::ENCRYPTION);
    leaf.map_or([0; 4], |leaf| {
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx].map(|register| register.get())
    })
}

fn vm_types(host: &SimHost) -> u32 {
    let mut types = 1 << vm_type::DEFAULT | 1 << vm_type::SW_PROTECTED;
    if let Some(psp) = host.psp() {
        for (tech, number) in [
            (Tech::Sev, vm_type::SEV),
            (Tech::SevEs, vm_type::SEV_ES),
            (Tech::SevSnp, vm_type::SNP),
        ] {
            types |= u32::from(!psp.asid_pools().range(tech).is_empty()) << number;
        }
    }
    types
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("host", &self.0.host)
            .field("vm_types", &format_args!("{:#x}", self.0.vm_types))
            .finish()
    }
}
