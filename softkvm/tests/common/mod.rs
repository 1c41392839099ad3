//! A kernel, a process, and short names for calls.
#![allow(dead_code)] // Each test uses some of it.

mod host;
pub(crate) mod psp;
pub(crate) mod td;

use std::ops::Deref;
use std::sync::OnceLock;

use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::{Kernel, Refusal};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::memory::{CreateGuestMemfd, UserspaceMemoryRegion2};
use kvm_ops_uapi::sev::{self, SevCmd, SevInit, SevLaunchStart};
use kvm_ops_uapi::vm::EnableCap;
use kvm_ops_uapi::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use host::Host;

pub(crate) type Answer = Result<i64, Refusal>;

/// A process with `/dev/kvm` and, on AMD, `/dev/sev` open.
pub(crate) struct World {
    host: Host,
    pub(crate) kvm: i32,
    pub(crate) sev: i32,
    kernel: Kernel,
}

impl Deref for World {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

/// One machine for all tests that do not count what is left.
fn machine(vendor: Vendor) -> &'static Kernel {
    static AMD: OnceLock<Kernel> = OnceLock::new();
    static INTEL: OnceLock<Kernel> = OnceLock::new();
    let kernel = if vendor == Vendor::Amd { &AMD } else { &INTEL };
    kernel.get_or_init(|| Kernel::new(SimHost::new(vendor)))
}

impl World {
    pub(crate) fn amd() -> Self {
        Self::of(machine(Vendor::Amd))
    }

    pub(crate) fn intel() -> Self {
        Self::of(machine(Vendor::Intel))
    }

    pub(crate) fn of(kernel: &Kernel) -> Self {
        let host = Host::without_files();
        let kvm = host.task.open(kernel.open_kvm()).unwrap();
        let sev = kernel
            .open_sev()
            .map_or(-1, |file| host.task.open(file).unwrap());
        Self {
            host,
            kvm,
            sev,
            kernel: kernel.clone(),
        }
    }

    pub(crate) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// A call with a structure.
    pub(crate) fn call<T: IntoBytes + Immutable>(
        &self,
        fd: i32,
        ioctl: Ioctl,
        value: &T,
    ) -> Answer {
        let at = self.task.put(value);
        self.ioctl(fd, ioctl, at)
    }

    /// A call that fills a structure.
    pub(crate) fn fetch<T: FromBytes + FromZeros + IntoBytes>(
        &self,
        fd: i32,
        ioctl: Ioctl,
    ) -> Result<T, Refusal> {
        let at = self.task.map(size_of::<T>());
        self.ioctl(fd, ioctl, at)?;
        self.task.get(at)
    }

    pub(crate) fn vm(&self, kind: u64) -> i32 {
        self.ioctl(self.kvm, ioctl::KVM_CREATE_VM, kind).unwrap() as i32
    }

    pub(crate) fn vcpu(&self, vm: i32, id: u64) -> i32 {
        self.ioctl(vm, ioctl::KVM_CREATE_VCPU, id).unwrap() as i32
    }

    pub(crate) fn gmem(&self, vm: i32, size: u64) -> i32 {
        let args = CreateGuestMemfd {
            size: U64::new(size),
            ..CreateGuestMemfd::default()
        };
        self.call(vm, ioctl::KVM_CREATE_GUEST_MEMFD, &args).unwrap() as i32
    }

    pub(crate) fn region(&self, vm: i32, region: &UserspaceMemoryRegion2) -> Answer {
        self.call(vm, ioctl::KVM_SET_USER_MEMORY_REGION2, region)
    }

    pub(crate) fn enable(&self, vm: i32, cap: u32, argument: u64) -> Answer {
        self.call(vm, ioctl::KVM_ENABLE_CAP, &enable_args(cap, argument))
    }

    /// A SEV command with the address of its structure.
    pub(crate) fn command_at(&self, vm: i32, id: u32, data: u64) -> (Answer, SevCmd) {
        let cmd = SevCmd {
            id: U32::new(id),
            data: U64::new(data),
            error: U32::new(0xdead),
            sev_fd: field(self.sev),
            ..SevCmd::default()
        };
        let at = self.task.put(&cmd);
        let answer = self.ioctl(vm, ioctl::KVM_MEMORY_ENCRYPT_OP, at);
        (answer, self.task.get(at).unwrap())
    }

    pub(crate) fn command<T>(&self, vm: i32, id: u32, value: &T) -> (Answer, T)
    where
        T: FromBytes + FromZeros + IntoBytes + Immutable,
    {
        let at = self.task.put(value);
        let (answer, _) = self.command_at(vm, id, at);
        (answer, self.task.get(at).unwrap())
    }

    /// A SEV command without a structure.
    pub(crate) fn bare(&self, vm: i32, id: u32) -> Answer {
        self.command_at(vm, id, 0).0
    }

    /// A SEV guest of type 2, 3 or 4.
    pub(crate) fn guest(&self, kind: u64) -> i32 {
        let vm = self.vm(kind);
        self.command(vm, sev::INIT2, &SevInit::default()).0.unwrap();
        vm
    }

    /// A SEV or SEV-ES guest of the default type.
    pub(crate) fn late_guest(&self, es: bool) -> i32 {
        let vm = self.vm(0);
        self.bare(vm, if es { sev::ES_INIT } else { sev::INIT })
            .unwrap();
        vm
    }

    pub(crate) fn launch(&self, vm: i32, policy: u32) {
        let args = SevLaunchStart {
            policy: U32::new(policy),
            ..SevLaunchStart::default()
        };
        self.command(vm, sev::LAUNCH_START, &args).0.unwrap();
    }

    /// A SEV guest whose launch has ended, with a policy.
    pub(crate) fn running(&self, policy: u32) -> i32 {
        let vm = self.guest(2);
        self.launch(vm, policy);
        let room = sev::SevRange {
            uaddr: U64::new(self.task.map(48)),
            len: U32::new(48),
            ..sev::SevRange::default()
        };
        self.command(vm, sev::LAUNCH_MEASURE, &room).0.unwrap();
        self.bare(vm, sev::LAUNCH_FINISH).unwrap();
        vm
    }

    /// Bytes of the task's: address and length.
    pub(crate) fn blob(&self, bytes: &[u8]) -> (U64, U32) {
        let address = self.task.put(bytes);
        (U64::new(address), U32::new(bytes.len() as u32))
    }

    pub(crate) fn launch_snp(&self, vm: i32) {
        self.command(vm, sev::SNP_LAUNCH_START, &snp_policy(0x3_0000))
            .0
            .unwrap();
    }

    /// A SEV-ES guest of the default type with measured vCPUs.
    pub(crate) fn measured(&self, vcpus: u64) -> i32 {
        let vm = self.late_guest(true);
        for id in 0..vcpus {
            self.vcpu(vm, id);
        }
        self.launch(vm, 4);
        self.bare(vm, sev::LAUNCH_UPDATE_VMSA).unwrap();
        vm
    }
}

pub(crate) fn enable_args(cap: u32, argument: u64) -> EnableCap {
    let mut args = EnableCap {
        cap: U32::new(cap),
        ..EnableCap::default()
    };
    args.args[0] = U64::new(argument);
    args
}

pub(crate) fn snp_policy(policy: u64) -> sev::SnpLaunchStart {
    sev::SnpLaunchStart {
        policy: U64::new(policy),
        ..sev::SnpLaunchStart::default()
    }
}

/// A slot of 2 MiB at 1 MiB, without memory behind it.
pub(crate) fn slot() -> UserspaceMemoryRegion2 {
    UserspaceMemoryRegion2 {
        slot: U32::new(1),
        guest_phys_addr: U64::new(0x10_0000),
        memory_size: U64::new(0x20_0000),
        userspace_addr: U64::new(0x7000_0000_0000),
        ..UserspaceMemoryRegion2::default()
    }
}

/// The same over a file.
pub(crate) fn file_slot(fd: i32) -> UserspaceMemoryRegion2 {
    UserspaceMemoryRegion2 {
        flags: U32::new(4),
        guest_memfd: field(fd),
        ..slot()
    }
}

/// A descriptor, as structures hold it.
pub(crate) fn field(fd: i32) -> U32 {
    U32::new(fd as u32)
}
