//! The back end of a normal VM: an `AnyVm` over the software machine, whose vCPUs execute machine code.
//!
//! It is made with the first vCPU, when it is known which interrupt controllers there are, or when these are used
//! before. Slots are lent to it in pieces: a slot with private memory is one piece for each run of frames that are equally
//! private or shared.

mod dirty;
mod pieces;

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_ops::sim::{SimHost, SimVcpu};
use kvm_ops::{
    AmdVcpu, AnyVcpu, Gfn, IntelVcpu, Irqchip, MemSlot, Privacy, SlotId, VcpuId, VcpuOps, VmConfig,
    create,
};
use kvm_ops_uapi::vm::{MAX_VCPUS, VCPU_ID_RATIO};

use crate::irq::Irq;
use crate::refusal::Result;
use crate::stats::Count;
use crate::vcpu::Links;
use crate::vm::lent::{self, BackEnd};

/// A vCPU that executes machine code.
pub(crate) type Processor = AnyVcpu<SimHost>;

/// The software machine's part of a vCPU.
pub(crate) fn port_mut(vcpu: &mut Processor) -> Option<&mut SimVcpu> {
    match vcpu {
        AnyVcpu::Intel(IntelVcpu::Vmx(vcpu)) => Some(vcpu.port_mut()),
        AnyVcpu::Amd(AmdVcpu::Svm(vcpu)) => Some(vcpu.port_mut()),
        AnyVcpu::Amd(AmdVcpu::Sev(vcpu)) => Some(vcpu.port_mut()),
        _ => None,
    }
}

/// Lets a vCPU leave the guest when a signal is pending or the end of an interrupt is to be told, gives its timer the
/// VM's tick, user space its say in MSRs, and counts halts.
pub(crate) fn connect(vcpu: &mut Processor, links: &Links) {
    let id = vcpu.id().0;
    if let Some(port) = port_mut(vcpu) {
        if let Some(cycle) = links.irq.apic_bus_cycle() {
            port.set_apic_bus_cycle(cycle);
        }
        port.set_msr_exits(Arc::clone(&links.msrs));
        port.set_hypercall_fix(Arc::clone(&links.hypercall_fix));
        let counts = Arc::clone(&links.counts);
        port.on_halt(move |halts| counts.add_more(Count::HaltExits, halts));
        let (area, irq) = (Arc::clone(&links.area), Arc::clone(&links.irq));
        port.set_interrupt_source(move || irq.has_end(id) || area.signal_pending());
    }
}

pub(crate) struct Machine {
    vm: BackEnd,
    /// What is lent, by its first address.
    pieces: BTreeMap<u64, MemSlot>,
    free: Vec<SlotId>,
    next: u32,
}

impl Machine {
    pub(crate) fn new(host: &SimHost, irqchip: Irqchip, irq: &Arc<Irq>) -> Result<Self> {
        let config = VmConfig::normal()
            .vcpus(MAX_VCPUS * VCPU_ID_RATIO)
            .irqchip(irqchip);
        let mut vm = create(host, &config).map_err(kvm_ops::Error::from)?;
        vm.finalize()?;
        let machine = Self {
            vm,
            pieces: BTreeMap::new(),
            free: Vec::new(),
            next: 0,
        };
        lent::with_port(&machine.vm, |port| Irq::attach(irq, port.wires()));
        Ok(machine)
    }

    pub(crate) fn create_vcpu(&mut self, id: u32, links: &Links) -> Result<Processor> {
        let mut vcpu = self.vm.create_vcpu(VcpuId(id))?;
        connect(&mut vcpu, links);
        Ok(vcpu)
    }

    /// Declares memory as missing that the guest takes for there, or no more.
    fn set_missing(&self, first: Gfn, pages: u64, kind: Option<Privacy>) {
        lent::with_port(&self.vm, |port| port.set_missing(first, pages, kind));
    }
}
