//! TDs, in short.

use super::{Answer, World, field};
use kvm_ops_softkvm::Process;
use kvm_ops_uapi::memory::{MemoryAttributes, UserspaceMemoryRegion2};
use kvm_ops_uapi::system::{Cpuid2, CpuidEntry2, vm_type};
use kvm_ops_uapi::tdx::{self, TdxCmd, TdxInitMemRegion, TdxInitVm};
use kvm_ops_uapi::{U32, U64, cap, ioctl};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A structure with a list behind it, as INIT_VM and SET_CPUID2 take them.
pub(crate) fn with_list<T: IntoBytes + Immutable>(head: &T, list: &[CpuidEntry2]) -> Vec<u8> {
    [head.as_bytes(), list.as_bytes()].concat()
}

/// A TD with the one attribute that KVM takes, and 48 bits of address.
pub(crate) fn init_args() -> (TdxInitVm, Vec<CpuidEntry2>) {
    let head = TdxInitVm {
        attributes: U64::new(1 << 28),
        nent: U32::new(1),
        ..TdxInitVm::default()
    };
    (head, vec![entry(0x8000_0008, 0, [48 << 16, 0, 0, 0])])
}

pub(crate) fn entry(leaf: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry2 {
    CpuidEntry2 {
        function: U32::new(leaf),
        index: U32::new(index),
        eax: U32::new(eax),
        ebx: U32::new(ebx),
        ecx: U32::new(ecx),
        edx: U32::new(edx),
        ..CpuidEntry2::default()
    }
}

impl World {
    /// A command on a VM or vCPU file. `hw_error` is as the call left it.
    pub(crate) fn tdx(&self, fd: i32, id: u32, flags: u32, data: u64) -> (Answer, u64) {
        let cmd = TdxCmd {
            id: U32::new(id),
            flags: U32::new(flags),
            data: U64::new(data),
            ..TdxCmd::default()
        };
        let at = self.task.put(&cmd);
        let answer = self.ioctl(fd, ioctl::KVM_MEMORY_ENCRYPT_OP, at);
        let after: TdxCmd = self.task.get(at).unwrap();
        (answer, after.hw_error.get())
    }

    /// A VM of type 5 with a split irqchip.
    pub(crate) fn td_vm(&self) -> i32 {
        let vm = self.vm(vm_type::TDX);
        self.enable(vm, cap::SPLIT_IRQCHIP, 24).unwrap();
        vm
    }

    pub(crate) fn init_vm(&self, vm: i32, args: &(TdxInitVm, Vec<CpuidEntry2>)) -> (Answer, u64) {
        let at = self.task.put(&with_list(&args.0, &args.1)[..]);
        self.tdx(vm, tdx::INIT_VM, 0, at)
    }

    /// The same, initialised.
    pub(crate) fn td(&self) -> i32 {
        let vm = self.td_vm();
        self.init_vm(vm, &init_args()).0.unwrap();
        vm
    }

    /// Gives a vCPU an x2APIC.
    pub(crate) fn set_cpuid(&self, vcpu: i32) {
        let head = Cpuid2 {
            nent: U32::new(1),
            ..Cpuid2::default()
        };
        let list = [entry(1, 0, [0, 0, 1 << 21, 0])];
        let at = self.task.put(&with_list(&head, &list)[..]);
        self.ioctl(vcpu, ioctl::KVM_SET_CPUID2, at).unwrap();
    }

    /// A vCPU that the module has.
    pub(crate) fn td_vcpu(&self, vm: i32, id: u64, rcx: u64) -> i32 {
        let vcpu = self.vcpu(vm, id);
        self.set_cpuid(vcpu);
        self.tdx(vcpu, tdx::INIT_VCPU, 0, rcx).0.unwrap();
        vcpu
    }

    /// A slot with a guest_memfd over memory that the process lends, all private by its attribute. Returns the
    /// file, and the address of the shared side.
    pub(crate) fn private_slot(&self, vm: i32, number: u32, gpa: u64, bytes: u64) -> (i32, u64) {
        let gmem = self.gmem(vm, bytes);
        let hva = self.map(bytes);
        let region = UserspaceMemoryRegion2 {
            slot: U32::new(number),
            flags: U32::new(4),
            guest_phys_addr: U64::new(gpa),
            memory_size: U64::new(bytes),
            userspace_addr: U64::new(hva),
            guest_memfd: field(gmem),
            ..UserspaceMemoryRegion2::default()
        };
        self.region(vm, &region).unwrap();
        self.set_private(vm, gpa, bytes, true);
        (gmem, hva)
    }

    pub(crate) fn set_private(&self, vm: i32, gpa: u64, bytes: u64, private: bool) {
        let args = MemoryAttributes {
            address: U64::new(gpa),
            size: U64::new(bytes),
            attributes: U64::new(if private { 8 } else { 0 }),
            ..MemoryAttributes::default()
        };
        self.call(vm, ioctl::KVM_SET_MEMORY_ATTRIBUTES, &args)
            .unwrap();
    }

    /// INIT_MEM_REGION; the structure as the call left it.
    pub(crate) fn add_memory(
        &self,
        vcpu: i32,
        flags: u32,
        (source, gpa, pages): (u64, u64, u64),
    ) -> (Answer, TdxInitMemRegion) {
        let region = TdxInitMemRegion {
            source_addr: U64::new(source),
            gpa: U64::new(gpa),
            nr_pages: U64::new(pages),
        };
        let at = self.task.put(&region);
        let (answer, hw_error) = self.tdx(vcpu, tdx::INIT_MEM_REGION, flags, at);
        assert_eq!(hw_error, 0, "commands on vCPU files are not copied back");
        (answer, self.task.get(at).unwrap())
    }

    /// Reads a structure wherever it is.
    pub(crate) fn get<T: FromBytes + IntoBytes + Immutable + KnownLayout>(&self, at: u64) -> T {
        let mut value = T::new_zeroed();
        self.read(at, value.as_mut_bytes()).unwrap();
        value
    }

    pub(crate) fn finalize(&self, vm: i32) -> (Answer, u64) {
        self.tdx(vm, tdx::FINALIZE_VM, 0, 0)
    }
}
