//! A VM with memory whose vCPU starts code in real mode.

use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::{Kernel, Process, Refusal, RunArea};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::memory::{CreateGuestMemfd, MemoryAttributes, UserspaceMemoryRegion2};
use kvm_ops_uapi::run::{EXIT_OFFSET, Io, RUN_SIZE, exit_reason};
use kvm_ops_uapi::state::Regs;
use kvm_ops_uapi::vm::EnableCap;
use kvm_ops_uapi::{U16, U32, U64};
use std::sync::Arc;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::host::Host;

/// Where code starts.
pub(crate) const CODE: u64 = 0x1000;
/// Bytes of memory from address 0 on.
pub(crate) const RAM: u64 = 0x1_0000;
/// Offset of the data of port accesses.
const PORT_DATA: u64 = 4096;

pub(crate) type Answer = Result<i64, Refusal>;

pub(crate) struct Guest {
    /// In front of the memory, so that it ends first.
    pub(crate) kernel: Kernel,
    pub(crate) host: Host,
    pub(crate) vm: i32,
    pub(crate) vcpu: i32,
    pub(crate) ram: u64,
}

pub(crate) fn kernel(vendor: Vendor) -> Kernel {
    Kernel::new(SimHost::new(vendor))
}

impl Guest {
    /// A normal VM without interrupt controllers in the kernel.
    pub(crate) fn new(code: &[u8]) -> Self {
        Self::with(code, 0, |_, _| ())
    }

    /// A VM of a type. `prepare` does what comes in front of vCPUs.
    pub(crate) fn with(code: &[u8], kind: u64, prepare: impl FnOnce(&Host, i32)) -> Self {
        Self::on(Vendor::Intel, code, kind, prepare)
    }

    pub(crate) fn on(
        vendor: Vendor,
        code: &[u8],
        kind: u64,
        prepare: impl FnOnce(&Host, i32),
    ) -> Self {
        let (kernel, host) = (kernel(vendor), Host::new());
        let kvm = host.task.open(kernel.open_kvm()).unwrap();
        let vm = host.ioctl(kvm, ioctl::KVM_CREATE_VM, kind).unwrap() as i32;
        prepare(&host, vm);
        let ram = host.map(RAM);
        let guest = Self {
            vcpu: host.ioctl(vm, ioctl::KVM_CREATE_VCPU, 0).unwrap() as i32,
            kernel,
            host,
            vm,
            ram,
        };
        guest.slot(0, 0, ram, RAM).unwrap();
        guest.write(CODE, code);
        guest.host.real_mode(guest.vcpu, CODE).unwrap();
        guest
    }

    pub(crate) fn add_vcpu(&self, id: u64, start: u64) -> i32 {
        let vcpu = self.ioctl(self.vm, ioctl::KVM_CREATE_VCPU, id).unwrap() as i32;
        self.host.real_mode(vcpu, start).unwrap();
        vcpu
    }

    pub(crate) fn ioctl(&self, fd: i32, ioctl: Ioctl, argument: u64) -> Answer {
        self.host.ioctl(fd, ioctl, argument)
    }

    pub(crate) fn call<T: IntoBytes + Immutable + ?Sized>(
        &self,
        fd: i32,
        ioctl: Ioctl,
        value: &T,
    ) -> Answer {
        let at = self.host.task.put(value);
        self.ioctl(fd, ioctl, at)
    }

    pub(crate) fn get<T: FromBytes + FromZeros + IntoBytes>(&self, fd: i32, ioctl: Ioctl) -> T {
        let at = self.host.task.map(size_of::<T>());
        self.ioctl(fd, ioctl, at).unwrap();
        self.host.task.get(at).unwrap()
    }

    pub(crate) fn regs(&self) -> Regs {
        self.get(self.vcpu, ioctl::KVM_GET_REGS)
    }

    pub(crate) fn set_regs(&self, regs: &Regs) {
        self.call(self.vcpu, ioctl::KVM_SET_REGS, regs).unwrap();
    }

    /// A slot over memory of the process. Zero bytes delete it.
    pub(crate) fn slot(&self, number: u32, gpa: u64, hva: u64, bytes: u64) -> Answer {
        self.slot_with(number, gpa, (hva, bytes), |_| ())
    }

    pub(crate) fn slot_with(
        &self,
        number: u32,
        gpa: u64,
        (hva, bytes): (u64, u64),
        change: impl FnOnce(&mut UserspaceMemoryRegion2),
    ) -> Answer {
        let mut region = UserspaceMemoryRegion2 {
            slot: U32::new(number),
            guest_phys_addr: U64::new(gpa),
            memory_size: U64::new(bytes),
            userspace_addr: U64::new(hva),
            ..UserspaceMemoryRegion2::default()
        };
        change(&mut region);
        self.call(self.vm, ioctl::KVM_SET_USER_MEMORY_REGION2, &region)
    }

    pub(crate) fn gmem(&self, size: u64, flags: u64) -> i32 {
        let args = CreateGuestMemfd {
            size: U64::new(size),
            flags: U64::new(flags),
            ..CreateGuestMemfd::default()
        };
        self.call(self.vm, ioctl::KVM_CREATE_GUEST_MEMFD, &args)
            .unwrap() as i32
    }

    /// Makes memory private (8) or shared (0).
    pub(crate) fn set_attributes(&self, address: u64, size: u64, attributes: u64) {
        let args = MemoryAttributes {
            address: U64::new(address),
            size: U64::new(size),
            attributes: U64::new(attributes),
            ..MemoryAttributes::default()
        };
        self.call(self.vm, ioctl::KVM_SET_MEMORY_ATTRIBUTES, &args)
            .unwrap();
    }

    pub(crate) fn enable(&self, cap: u32, argument: u64) {
        let mut args = EnableCap {
            cap: U32::new(cap),
            ..EnableCap::default()
        };
        args.args[0] = U64::new(argument);
        self.call(self.vm, ioctl::KVM_ENABLE_CAP, &args).unwrap();
    }

    /// Writes guest memory from address 0 on.
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        self.host.write(self.ram + gpa, bytes).unwrap();
    }

    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        self.read_at(self.ram + gpa)
    }

    /// Reads memory of the process.
    pub(crate) fn read_at<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.host.read(address, &mut bytes).unwrap();
        bytes
    }

    /// The run page and the port data.
    pub(crate) fn area(&self, vcpu: i32) -> Arc<dyn RunArea> {
        let file = self.host.task.file(vcpu).unwrap();
        Arc::clone(file.run_area().unwrap())
    }

    pub(crate) fn page_byte(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.area(self.vcpu).read(offset, &mut byte);
        byte[0]
    }

    pub(crate) fn set_page_byte(&self, offset: u64, byte: u8) {
        assert!((offset as usize) < RUN_SIZE);
        self.area(self.vcpu).write(offset, &[byte]);
    }

    pub(crate) fn set_immediate_exit(&self, on: bool) {
        self.set_page_byte(1, on.into());
    }

    /// Runs, and returns the reason of the exit.
    pub(crate) fn run(&self) -> u32 {
        self.run_vcpu(self.vcpu).unwrap()
    }

    pub(crate) fn run_vcpu(&self, vcpu: i32) -> Result<u32, Refusal> {
        self.ioctl(vcpu, ioctl::KVM_RUN, 0)?;
        Ok(self.reason(vcpu))
    }

    pub(crate) fn reason(&self, vcpu: i32) -> u32 {
        let mut bytes = [0; 4];
        self.area(vcpu).read(8, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The structure of the last exit.
    pub(crate) fn exit<T: FromBytes + FromZeros + IntoBytes>(&self) -> T {
        let mut value = T::new_zeroed();
        let area = self.area(self.vcpu);
        area.read(EXIT_OFFSET as u64, value.as_mut_bytes());
        value
    }

    pub(crate) fn answer<T: IntoBytes + Immutable>(&self, value: &T) {
        let area = self.area(self.vcpu);
        area.write(EXIT_OFFSET as u64, value.as_bytes());
    }

    /// Runs to a port access: direction (1 for OUT), port, size and items, and its data.
    pub(crate) fn run_to_port(&self) -> ((u8, u16, u8, u32), Vec<u8>) {
        self.run_vcpu_to_port(self.vcpu)
    }

    pub(crate) fn run_vcpu_to_port(&self, vcpu: i32) -> ((u8, u16, u8, u32), Vec<u8>) {
        assert_eq!(self.run_vcpu(vcpu).unwrap(), exit_reason::IO);
        let area = self.area(vcpu);
        let mut io = Io::default();
        area.read(EXIT_OFFSET as u64, io.as_mut_bytes());
        assert_eq!(io.data_offset.get(), PORT_DATA);
        let mut data = vec![0; usize::from(io.size) * io.count.get() as usize];
        area.read(PORT_DATA, &mut data);
        let access = (io.direction, U16::get(io.port), io.size, io.count.get());
        (access, data)
    }

    pub(crate) fn set_port_data(&self, data: &[u8]) {
        self.area(self.vcpu).write(PORT_DATA, data);
    }
}
