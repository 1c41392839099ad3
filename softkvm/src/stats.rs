//! Statistics files: `KVM_GET_STATS_FD`. A VM counts how often memory was taken from its guest, a vCPU its exits by their kind.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ops_uapi::checks::stats_fd::DESCRIPTOR;
use kvm_ops_uapi::stats::{CUMULATIVE, NAME_SIZE, StatsDesc, StatsHeader};
use kvm_ops_uapi::{U16, U32};
use zerocopy::IntoBytes;

use crate::refusal::Result;
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use crate::{File, Process};

/// A number that a vCPU counts, under the kernel's name.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Count {
    Exits,
    IoExits,
    MmioExits,
    SignalExits,
    IrqWindowExits,
    HaltExits,
    Hypercalls,
}

const NAMES: [&str; 7] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "signal_exits",
    "irq_window_exits",
    "halt_exits",
    "hypercalls",
];

/// The numbers of a VM, under the kernel's names. Each flush that is requested is made.
const OF_VMS: [&str; 2] = ["remote_tlb_flush", "remote_tlb_flush_requests"];

/// The numbers of a vCPU.
#[derive(Default)]
pub(crate) struct Counts([AtomicU64; NAMES.len()]);

impl Counts {
    pub(crate) fn add(&self, count: Count) {
        self.add_more(count, 1);
    }

    pub(crate) fn add_more(&self, count: Count, more: u64) {
        self.0[count as usize].fetch_add(more, Ordering::Relaxed);
    }

    fn numbers(&self) -> Vec<u64> {
        let numbers = self.0.iter();
        numbers
            .map(|number| number.load(Ordering::Relaxed))
            .collect()
    }
}

/// An open statistics file, which keeps its VM.
pub(crate) struct StatsFile {
    vm: Arc<Vm>,
    vcpu: Option<Arc<Vcpu>>,
    position: Mutex<u64>,
}

/// Text with zeros behind it. What is too long is cut.
fn text(from: &str) -> [u8; NAME_SIZE] {
    let mut bytes = [0; NAME_SIZE];
    for (to, byte) in bytes[..NAME_SIZE - 1].iter_mut().zip(from.bytes()) {
        *to = byte;
    }
    bytes
}

impl StatsFile {
    /// The file as it is now: header, identification, descriptions, numbers.
    fn contents(&self) -> Vec<u8> {
        let (names, numbers): (&[&str], Vec<u64>) = match &self.vcpu {
            Some(vcpu) => (&NAMES, vcpu.counts().numbers()),
            None => (&OF_VMS, vec![self.vm.lock().flushes; OF_VMS.len()]),
        };
        let id_offset = size_of::<StatsHeader>();
        let desc_offset = id_offset + NAME_SIZE;
        let header = StatsHeader {
            flags: U32::ZERO,
            name_size: U32::new(NAME_SIZE as u32),
            num_desc: U32::new(names.len() as u32),
            id_offset: U32::new(id_offset as u32),
            desc_offset: U32::new(desc_offset as u32),
            data_offset: U32::new((desc_offset + names.len() * size_of::<StatsDesc>()) as u32),
        };
        let process = self.vm.creator().0;
        let id = match &self.vcpu {
            Some(vcpu) => format!("kvm-{process}/vcpu-{}", vcpu.id()),
            None => format!("kvm-{process}"),
        };
        let descriptions = (0..).zip(names).map(|(place, name)| StatsDesc {
            flags: U32::new(CUMULATIVE),
            exponent: U16::ZERO,
            size: U16::new(1),
            offset: U32::new(place * 8),
            bucket_size: U32::ZERO,
            name: text(name),
        });
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(text(&id));
        descriptions.for_each(|description| bytes.extend(description.as_bytes()));
        bytes.extend(numbers.into_iter().flat_map(u64::to_le_bytes));
        bytes
    }

    /// Up to so many bytes from an offset on, none at the end.
    fn read_at(&self, offset: u64, len: usize) -> Vec<u8> {
        let contents = self.contents();
        let from = usize::try_from(offset).map_or(contents.len(), |from| from.min(contents.len()));
        contents[from..].iter().take(len).copied().collect()
    }

    /// The same from `offset` on, or from the file's position, which moves on.
    pub(crate) fn read(&self, offset: Option<u64>, len: usize) -> Vec<u8> {
        if let Some(offset) = offset {
            return self.read_at(offset, len);
        }
        let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = self.read_at(*position, len);
        *position += bytes.len() as u64;
        bytes
    }
}

/// `KVM_GET_STATS_FD`.
pub(crate) fn open(vm: &Arc<Vm>, vcpu: Option<&Arc<Vcpu>>, process: &dyn Process) -> Result<i64> {
    let number = process.reserve().map_err(|_| DESCRIPTOR)?;
    let file = StatsFile {
        vm: Arc::clone(vm),
        vcpu: vcpu.cloned(),
        position: Mutex::default(),
    };
    process.install(number, File::stats(Arc::new(file)));
    Ok(number.into())
}
