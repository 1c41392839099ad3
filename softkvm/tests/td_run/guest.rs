//! A TD made by the kernel's calls, whose vCPU executes what a test assembles.

use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::{Kernel, Process, RunArea};
use kvm_ops_uapi::run::{EXIT_OFFSET, Io, Mmio, RUN_SIZE, exit_reason};
use kvm_ops_uapi::{cap, ioctl};
use std::sync::Arc;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

#[path = "../common/td_code.rs"]
mod code;

pub(crate) use code::*;

use crate::common::td::init_args;
use crate::common::{Answer, World};

/// Low memory, private at first.
pub(crate) const LOW: u64 = 0x10_0000;
pub(crate) const LOW_BYTES: u64 = 0x20_0000;
/// An address that no slot has.
pub(crate) const DEVICE: u64 = 0x4000_0000;

/// A TD that is ready to run.
pub(crate) struct Td {
    pub(crate) w: World,
    pub(crate) host: SimHost,
    pub(crate) vm: i32,
    pub(crate) vcpu: i32,
    /// The shared side of low memory.
    pub(crate) low: u64,
    area: Arc<dyn RunArea>,
}

/// RCX of the first entry.
pub(crate) const RCX: u64 = 0x1122_3344_5566_7788;

impl Td {
    pub(crate) fn new(code: Part) -> Self {
        let host = SimHost::new(Vendor::Intel);
        let w = World::of(&Kernel::new(host.clone()));
        let vm = w.td_vm();
        w.init_vm(vm, &init_args()).0.unwrap();
        w.private_slot(vm, 0, TOP, TOP_BYTES);
        let (_, low) = w.private_slot(vm, 1, LOW, LOW_BYTES);
        let vcpu = w.td_vcpu(vm, 0, RCX);
        let memory = image(code);
        let source = w.task.put(&memory[..]);
        w.add_memory(vcpu, 1, (source, TOP, 16)).0.unwrap();
        w.finalize(vm).0.unwrap();
        let area = Arc::clone(w.task.file(vcpu).unwrap().run_area().unwrap());
        Self {
            w,
            host,
            vm,
            vcpu,
            low,
            area,
        }
    }

    /// Lets MapGPA leave to user space.
    pub(crate) fn with_conversions(self) -> Self {
        self.w
            .enable(self.vm, cap::EXIT_HYPERCALL, 1 << 12)
            .unwrap();
        self
    }

    pub(crate) fn run(&self) -> Answer {
        self.w.ioctl(self.vcpu, ioctl::KVM_RUN, 0)
    }

    /// A run that ends with an exit, whose structure is returned.
    #[track_caller]
    pub(crate) fn runs_to<T: FromBytes + FromZeros + IntoBytes>(&self, reason: u32) -> T {
        assert_eq!(self.run(), Ok(0));
        self.exit(reason)
    }

    #[track_caller]
    pub(crate) fn exit<T: FromBytes + FromZeros + IntoBytes>(&self, reason: u32) -> T {
        let mut page = [0; RUN_SIZE];
        self.area.read(0, &mut page);
        assert_eq!(page[8..12], reason.to_le_bytes(), "{:?}", &page[8..80]);
        let mut exit = T::new_zeroed();
        self.area.read(EXIT_OFFSET as u64, exit.as_mut_bytes());
        exit
    }

    /// Writes the structure of the exit back.
    pub(crate) fn answer<T: IntoBytes + Immutable>(&self, exit: &T) {
        self.area.write(EXIT_OFFSET as u64, exit.as_bytes());
    }

    pub(crate) fn set_byte(&self, offset: u64, value: u8) {
        self.area.write(offset, &[value]);
    }

    /// The next 64-bit value that the guest says.
    #[track_caller]
    pub(crate) fn says(&self) -> u64 {
        let [low, high] = [(), ()].map(|()| {
            let io: Io = self.runs_to(exit_reason::IO);
            let told = (io.direction, io.size, io.port.get(), io.count.get());
            assert_eq!(told, (1, 4, SAY, 1));
            u64::from(u32::from_le_bytes(self.port_data(io)))
        });
        high << 32 | low
    }

    pub(crate) fn port_data(&self, io: Io) -> [u8; 4] {
        let mut data = [0; 4];
        self.area.read(io.data_offset.get(), &mut data);
        data
    }

    pub(crate) fn set_port_data(&self, io: Io, data: &[u8]) {
        self.area.write(io.data_offset.get(), data);
    }

    pub(crate) fn device_read(&self, mmio: Mmio, data: [u8; 8]) {
        self.answer(&Mmio { data, ..mmio });
    }

    /// Bytes of low memory's shared side.
    pub(crate) fn shared(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.w.read(self.low + (gpa - LOW), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}
