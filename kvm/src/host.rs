//! The machine: one open `/dev/kvm`.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_CAP_VM_TYPES, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};
use kvm_ops::{
    Call, EncParams, Error, Field, Host, Missing, NoPort, Result, Tech, Vendor, VmId, VmIds,
    VmParams,
};

use kvm_ops_uapi::system::vm_type;

use crate::error::sys;
use crate::{KvmVm, Offer, OpenError, held, open, vendor};

/// The real machine, through `/dev/kvm`. A handle: clones share the open device.
///
/// ```no_run
/// use kvm_ops_core::{Host, Tech, VmParams};
/// use kvm_ops_kvm::KvmHost;
///
/// let host = match KvmHost::open() {
///     Ok(host) => host,
///     Err(error) => {
///         eprintln!("{error}\nhint: {}", error.hint());
///         return;
///     }
/// };
/// let vm = host.create_vm(Tech::normal(host.vendor()), &VmParams::new(1)).unwrap();
/// # drop(vm);
/// ```
#[derive(Clone)]
pub struct KvmHost {
    inner: Arc<Inner>,
}

struct Inner {
    kvm: Kvm,
    vendor: Vendor,
    ids: VmIds,
    run_size: usize,
    /// The answer of `KVM_GET_SUPPORTED_CPUID`: the CPUID that every vCPU starts with.
    cpuid: CpuId,
    /// The answer of `KVM_GET_MSR_INDEX_LIST`, sorted.
    msrs: Vec<u32>,
}

impl KvmHost {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`OpenError`] names the reason, and its [`hint`](OpenError::hint) the remedy.
    pub fn open() -> Result<Self, OpenError> {
        Self::open_path(Path::new("/dev/kvm"))
    }

    /// Opens a KVM device of another name, as some containers have it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_path(path: &Path) -> Result<Self, OpenError> {
        let kvm = open::open(path)?;
        let run_size = kvm
            .get_vcpu_mmap_size()
            .map_err(query("KVM_GET_VCPU_MMAP_SIZE"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(query("KVM_GET_SUPPORTED_CPUID"))?;
        let name = vendor_of(&cpuid);
        let vendor = vendor::from_string(&name).ok_or(OpenError::UnknownVendor { name })?;
        let list = kvm
            .get_msr_index_list()
            .map_err(query("KVM_GET_MSR_INDEX_LIST"))?;
        let mut msrs = list.as_slice().to_vec();
        msrs.sort_unstable();
        tracing::debug!(path = %path.display(), %vendor, "KVM opened");
        Ok(Self {
            inner: Arc::new(Inner {
                kvm,
                vendor,
                ids: VmIds::new(),
                run_size,
                cpuid,
                msrs,
            }),
        })
    }

    /// The open device, for ioctls that this type does not wrap.
    pub fn fd(&self) -> &Kvm {
        &self.inner.kvm
    }

    /// The CPUID that this KVM can give to guests (`KVM_GET_SUPPORTED_CPUID`).
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.inner.cpuid
    }

    /// The MSRs that this KVM keeps or emulates for guests (`KVM_GET_MSR_INDEX_LIST`), sorted.
    pub fn msrs(&self) -> &[u32] {
        &self.inner.msrs
    }

    /// Finds out what this host offers by trying it: a VM of each technology, and each capability on
    /// a short-lived VM. Takes some milliseconds.
    pub fn offer(&self) -> Offer {
        Offer::probe(self)
    }

    /// The bitmap of VM types; a kernel that does not know the question has type 0 only.
    pub(crate) fn vm_types(&self) -> u32 {
        self.check(KVM_CAP_VM_TYPES).max(1)
    }

    /// Bytes of the page set that a vCPU shares with the kernel.
    pub(crate) fn run_size(&self) -> usize {
        self.inner.run_size
    }

    /// The number that `KVM_CHECK_EXTENSION` answers; 0 where it fails.
    pub(crate) fn check(&self, capability: u32) -> u32 {
        let answer = self.inner.kvm.check_extension_raw(capability.into());
        u32::try_from(answer).unwrap_or(0)
    }

    fn create_fd(&self, tech: Tech, params: &VmParams) -> Result<VmFd> {
        if tech.vendor() != Some(self.inner.vendor) {
            return Err(Error::unsupported(Missing::Vendor, tech));
        }
        let not_offered = Err(Error::unsupported(Missing::HostTech, tech));
        let kind = match tech.kvm_vm_type() {
            None => return not_offered,
            Some(_) if held::is_late(params) => vm_type::DEFAULT,
            Some(_) if params.enc == EncParams::Private => vm_type::SW_PROTECTED,
            Some(kind) => kind,
        };
        if kind != 0 && self.vm_types() >> kind & 1 == 0 {
            return not_offered;
        }
        // KVM starts kernel threads for a VM, and a signal at that moment makes it return EINTR
        // though nothing is wrong. The number of tries is bounded because signals may keep coming.
        let mut tries = 8;
        loop {
            match self.inner.kvm.create_vm_with_type(kind) {
                Err(error) if error.errno() == libc::EINTR && tries > 0 => tries -= 1,
                Err(error) if error.errno() == libc::EINVAL && kind != 0 => {
                    return not_offered;
                }
                result => return result.map_err(sys(Call::CreateVm)),
            }
        }
    }
}

/// The vendor of the guests that this KVM holds, which is that of its processors. KVM's answer counts, because
/// programs may have a KVM under them that is not the processor's.
fn vendor_of(cpuid: &CpuId) -> String {
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 0);
    leaf.map_or_else(vendor::vendor_string, |leaf| {
        vendor::name_of([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
    })
}

fn query(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> OpenError {
    move |error| OpenError::Query {
        call,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

impl Host for KvmHost {
    type Vm = KvmVm;
    type Seam = NoPort;
    type Psp = NoPort;
    type Pages = NoPort;

    fn name(&self) -> &'static str {
        "kvm"
    }

    fn vendor(&self) -> Vendor {
        self.inner.vendor
    }

    fn next_vm_id(&self) -> VmId {
        self.inner.ids.next()
    }

    /// # Errors
    /// Besides those of the trait: [`Error::Invalid`] for more vCPUs than this KVM takes
    /// (`KVM_CAP_MAX_VCPUS`), [`Error::HostLacks`] for a kind of irqchip that it lacks.
    fn create_vm(&self, tech: Tech, params: &VmParams) -> Result<KvmVm> {
        params.validate()?;
        if params.vcpus as usize > self.inner.kvm.get_max_vcpus() {
            return Err(Error::Invalid(Field::VcpuCount, params.vcpus.into()));
        }
        KvmVm::new(self.clone(), self.create_fd(tech, params)?, tech, params)
    }

    fn holds(&self, tech: Tech) -> bool {
        tech.is_confidential()
    }
}

impl fmt::Debug for KvmHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmHost")
            .field("vendor", &self.inner.vendor)
            .finish_non_exhaustive()
    }
}
