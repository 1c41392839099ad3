//! A SEV, SEV-ES or SNP guest made by the kernel's calls, whose vCPU starts in long mode with what a test assembles.

use std::sync::Arc;

use kvm_ops::sim::SimHost;
use kvm_ops::{Host, PspPort, Vendor};
use kvm_ops_softkvm::{Kernel, Process, RunArea};
use kvm_ops_uapi::memory::{MemoryAttributes, UserspaceMemoryRegion2};
use kvm_ops_uapi::run::{EXIT_OFFSET, Io, exit_reason};
use kvm_ops_uapi::sev::{self, SevInit, SevRange, SnpLaunchFinish, SnpLaunchUpdate, page_type};
use kvm_ops_uapi::state::{Regs, Segment, Sregs};
use kvm_ops_uapi::system::vm_type::{DEFAULT, SEV, SEV_ES, SNP};
use kvm_ops_uapi::{U32, U64, cap, ioctl};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

#[path = "../common/sev_code.rs"]
mod code;

pub(crate) use code::*;

use crate::common::{Answer, World, field, snp_policy};

/// An address that no slot has.
pub(crate) const DEVICE: u64 = 0x1000_0000;

pub(crate) struct Guest {
    pub(crate) w: World,
    pub(crate) host: SimHost,
    pub(crate) kind: u64,
    pub(crate) vm: i32,
    pub(crate) vcpu: i32,
    /// Where the memory is in the process.
    pub(crate) ram: u64,
    pub(crate) gmem: i32,
}

impl Guest {
    /// A guest that was launched and may run.
    pub(crate) fn new(kind: u64, code: Part) -> Self {
        let guest = Self::prepared(kind, code);
        guest.launch(if kind == SEV_ES { 4 } else { 0 });
        guest
    }

    /// A guest with memory and a vCPU, whose launch has not begun.
    pub(crate) fn prepared(kind: u64, code: Part) -> Self {
        Self::prepared_by(kind, code, |w, vm| {
            w.command(vm, sev::INIT2, &SevInit::default()).0.unwrap();
        })
    }

    pub(crate) fn prepared_by(kind: u64, code: Part, init: impl FnOnce(&World, i32)) -> Self {
        let host = SimHost::new(Vendor::Amd);
        let w = World::of(&Kernel::new(host.clone()));
        let vm = w.vm(kind);
        init(&w, vm);
        let ram = w.map(RAM);
        let mut guest = Self {
            w,
            host,
            kind,
            vm,
            vcpu: -1,
            ram,
            gmem: -1,
        };
        guest.set_slot();
        guest.fill(code);
        guest.vcpu = guest.w.vcpu(vm, 0);
        guest.set_registers(guest.vcpu);
        guest
    }

    fn set_slot(&mut self) {
        if self.kind == SNP {
            self.gmem = self.w.gmem(self.vm, RAM);
        }
        let region = UserspaceMemoryRegion2 {
            flags: U32::new(if self.kind == SNP { 4 } else { 0 }),
            memory_size: U64::new(RAM),
            userspace_addr: U64::new(self.ram),
            guest_memfd: field(self.gmem),
            ..UserspaceMemoryRegion2::default()
        };
        self.w.region(self.vm, &region).unwrap();
    }

    /// The same memory for another VM.
    pub(crate) fn set_slot_of(&self, vm: i32) {
        let region = UserspaceMemoryRegion2 {
            memory_size: U64::new(RAM),
            userspace_addr: U64::new(self.ram),
            ..UserspaceMemoryRegion2::default()
        };
        self.w.region(vm, &region).unwrap();
    }

    fn fill(&self, code: Part) {
        let c_bit = self.host.psp().unwrap().c_bit();
        self.write(0, &image(c_bit, code));
    }

    /// The processor that KVM supports.
    pub(crate) fn set_cpuid(&self, vcpu: i32) {
        const ROOM: u32 = 256;
        let list = self.w.task.map(8 + ROOM as usize * 40);
        self.w.task.write(list, &ROOM.to_le_bytes()).unwrap();
        let get = ioctl::KVM_GET_SUPPORTED_CPUID;
        self.w.ioctl(self.w.kvm, get, list).unwrap();
        self.w.ioctl(vcpu, ioctl::KVM_SET_CPUID2, list).unwrap();
    }

    /// What user space carries to a vCPU of another VM.
    pub(crate) fn set_state(&self, vcpu: i32, sregs: &Sregs, regs: &Regs) {
        self.set_cpuid(vcpu);
        self.w.call(vcpu, ioctl::KVM_SET_SREGS, sregs).unwrap();
        self.w.call(vcpu, ioctl::KVM_SET_REGS, regs).unwrap();
    }

    pub(crate) fn set_registers(&self, vcpu: i32) {
        self.set_cpuid(vcpu);
        let data = Segment {
            limit: U32::new(!0),
            kind: 3,
            present: 1,
            s: 1,
            g: 1,
            db: 1,
            ..Segment::default()
        };
        let mut sregs: Sregs = self.get(vcpu, ioctl::KVM_GET_SREGS);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.cs = Segment {
            kind: 11,
            l: 1,
            db: 0,
            ..data
        };
        sregs.idt.limit = kvm_ops_uapi::U16::ZERO;
        sregs.cr0 = U64::new(0x8000_0021);
        sregs.cr3 = U64::new(TABLES);
        sregs.cr4 = U64::new(0x4_0620); // PAE, SSE, XSAVE
        sregs.efer = U64::new(0x500);
        self.w.call(vcpu, ioctl::KVM_SET_SREGS, &sregs).unwrap();
        let regs = Regs {
            rip: U64::new(CODE),
            rsp: U64::new(STACK),
            rflags: U64::new(2),
            ..Regs::default()
        };
        self.w.call(vcpu, ioctl::KVM_SET_REGS, &regs).unwrap();
    }

    /// The launch, with a policy beside what each technology demands.
    pub(crate) fn launch(&self, policy: u32) {
        match self.kind {
            SNP => self.launch_snp(policy.into()),
            _ => self.launch_with(policy, |_| {}),
        }
    }

    /// The launch of a SEV or SEV-ES guest, with more commands before it is measured.
    pub(crate) fn launch_with(&self, policy: u32, more: impl FnOnce(&Self)) {
        self.w.launch(self.vm, policy);
        let range = SevRange {
            uaddr: U64::new(self.ram),
            len: U32::new(OPEN as u32),
            ..SevRange::default()
        };
        self.command(sev::LAUNCH_UPDATE_DATA, &range).unwrap();
        more(self);
        if policy & 4 != 0 {
            self.w.bare(self.vm, sev::LAUNCH_UPDATE_VMSA).unwrap();
        }
        let room = SevRange {
            uaddr: U64::new(self.w.task.map(256)),
            len: U32::new(256),
            ..SevRange::default()
        };
        self.command(sev::LAUNCH_MEASURE, &room).unwrap();
        self.w.bare(self.vm, sev::LAUNCH_FINISH).unwrap();
    }

    fn launch_snp(&self, policy: u64) {
        self.command(sev::SNP_LAUNCH_START, &snp_policy(policy | 0x3_0000))
            .unwrap();
        self.set_attributes(0, OPEN, 8);
        let update = SnpLaunchUpdate {
            uaddr: U64::new(self.ram),
            len: U64::new(OPEN),
            kind: page_type::NORMAL,
            ..SnpLaunchUpdate::default()
        };
        self.command(sev::SNP_LAUNCH_UPDATE, &update).unwrap();
        self.command(sev::SNP_LAUNCH_FINISH, &SnpLaunchFinish::default())
            .unwrap();
    }

    pub(crate) fn command<T>(&self, id: u32, value: &T) -> Answer
    where
        T: FromBytes + FromZeros + IntoBytes + Immutable,
    {
        self.w.command(self.vm, id, value).0
    }

    /// Makes memory private (8) or shared (0).
    pub(crate) fn set_attributes(&self, address: u64, size: u64, attributes: u64) {
        let args = MemoryAttributes {
            address: U64::new(address),
            size: U64::new(size),
            attributes: U64::new(attributes),
            ..MemoryAttributes::default()
        };
        let set = ioctl::KVM_SET_MEMORY_ATTRIBUTES;
        self.w.call(self.vm, set, &args).unwrap();
    }

    pub(crate) fn allow_conversions(&self) {
        self.w
            .enable(self.vm, cap::EXIT_HYPERCALL, 1 << 12)
            .unwrap();
    }

    pub(crate) fn get<T: FromBytes + FromZeros + IntoBytes>(
        &self,
        fd: i32,
        ioctl: ioctl::Ioctl,
    ) -> T {
        let at = self.w.task.map(size_of::<T>());
        self.w.ioctl(fd, ioctl, at).unwrap();
        self.w.task.get(at).unwrap()
    }

    pub(crate) fn regs(&self) -> Regs {
        self.get(self.vcpu, ioctl::KVM_GET_REGS)
    }

    /// Writes guest memory, as the process has it.
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        self.w.write(self.ram + gpa, bytes).unwrap();
    }

    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.w.read(self.ram + gpa, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn area(&self) -> Arc<dyn RunArea> {
        let file = self.w.task.file(self.vcpu).unwrap();
        Arc::clone(file.run_area().unwrap())
    }

    pub(crate) fn try_run(&self) -> Answer {
        self.w.ioctl(self.vcpu, ioctl::KVM_RUN, 0)
    }

    pub(crate) fn reason(&self) -> u32 {
        let mut bytes = [0; 4];
        self.area().read(8, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn run(&self) -> u32 {
        self.try_run().unwrap();
        self.reason()
    }

    /// The structure of the last exit.
    pub(crate) fn exit<T: FromBytes + FromZeros + IntoBytes>(&self) -> T {
        let mut value = T::new_zeroed();
        self.area().read(EXIT_OFFSET as u64, value.as_mut_bytes());
        value
    }

    pub(crate) fn runs_to<T: FromBytes + FromZeros + IntoBytes>(&self, reason: u32) -> T {
        assert_eq!(self.run(), reason);
        self.exit()
    }

    pub(crate) fn answer<T: IntoBytes + Immutable>(&self, value: &T) {
        self.area().write(EXIT_OFFSET as u64, value.as_bytes());
    }

    /// Runs to what the guest says.
    pub(crate) fn says(&self) -> u32 {
        let io: Io = self.runs_to(exit_reason::IO);
        let access = (io.direction, io.size, io.port.get(), io.count.get());
        assert_eq!(access, (1, 4, SAY, 1));
        let mut data = [0; 4];
        self.area().read(io.data_offset.get(), &mut data);
        u32::from_le_bytes(data)
    }
}

/// Registers behind an OUT that left the guest, whose completion is done with them.
pub(crate) fn behind_port_access(regs: Regs) -> Regs {
    const BYTES: u64 = 2;
    Regs {
        rip: U64::new(regs.rip.get() + BYTES),
        ..regs
    }
}

/// The types whose guests run, with a name.
pub(crate) const KINDS: [u64; 3] = [SEV, SEV_ES, SNP];
/// Those whose registers are secret.
pub(crate) const SECRET: [u64; 2] = [SEV_ES, SNP];
/// A VM that becomes a guest late.
pub(crate) const LATE: u64 = DEFAULT;
