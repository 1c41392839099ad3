//! The vCPUs of TDs that execute machine code, by their TDVPR pages.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::{Hpa, VcpuId};
use soft_tdx_module::{Event, LpError, Platform, Regs};

use super::HostApic;
use super::processor::Processor;
use crate::irq::Wake;
use crate::vm::VmInner;

/// The vCPUs whose TDH.VP.ENTER runs a processor. The others run guest programs of the module.
#[derive(Debug, Default)]
pub(super) struct Vcpus(Mutex<HashMap<u64, Arc<Vcpu>>>);

/// A vCPU, and its processor from the first entry on.
pub(super) struct Vcpu {
    id: VcpuId,
    tdvpr: u64,
    /// The VM forgets the vCPU when it is closed, or the two would keep each other. It changes when the TD
    /// moves.
    vm: Mutex<Arc<VmInner>>,
    wake: Arc<Wake>,
    apic: Option<Arc<HostApic>>,
    processor: Mutex<Option<Box<Processor>>>,
}

/// The address of the TDVPR in RCX of TDH.VP.ENTER. Two flags lie above it.
const TDVPR: u64 = 0x000f_ffff_ffff_f000;

impl Vcpus {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Vcpu>>> {
        // No entry is half made when a panic elsewhere poisons the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(
        &self,
        id: VcpuId,
        tdvpr: Hpa,
        vm: &Arc<VmInner>,
        wake: Arc<Wake>,
        apic: Option<Arc<HostApic>>,
    ) {
        let vcpu = Vcpu {
            id,
            tdvpr: tdvpr.get(),
            vm: Mutex::new(Arc::clone(vm)),
            wake,
            apic,
            processor: Mutex::default(),
        };
        self.lock().insert(tdvpr.get(), Arc::new(vcpu));
    }

    /// The instructions that a vCPU executed so far; `None` for one that runs a guest program.
    pub(super) fn instructions(&self, tdvpr: Hpa) -> Option<u64> {
        let vcpu = self.lock().get(&tdvpr.get()).cloned()?;
        let processor = vcpu.processor();
        Some(
            processor
                .as_ref()
                .map_or(0, |processor| processor.instructions()),
        )
    }

    /// The vCPU runs a guest program from now on.
    pub(super) fn remove(&self, tdvpr: Hpa) {
        self.lock().remove(&tdvpr.get());
    }

    /// Forgets the vCPUs of a VM.
    pub(super) fn remove_all(&self, vm: &VmInner) {
        self.lock().retain(|_, vcpu| !vcpu.is_of(vm));
    }

    /// The vCPUs of one VM go on in another.
    pub(super) fn hand_over(&self, to: &Arc<VmInner>, from: &VmInner) {
        for vcpu in self.lock().values().filter(|vcpu| vcpu.is_of(from)) {
            *vcpu.vm() = Arc::clone(to);
            from.turns.part(vcpu.id.0);
            to.turns.join(vcpu.id.0);
            if let Some(processor) = &mut *vcpu.processor() {
                processor.move_to(to);
            }
        }
    }

    /// The vCPU that an entry with this RCX runs.
    pub(super) fn entered_by(&self, rcx: u64) -> Option<Arc<Vcpu>> {
        self.lock().get(&(rcx & TDVPR)).cloned()
    }
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("id", &self.id)
            .field("tdvpr", &format_args!("{:#x}", self.tdvpr))
            .finish_non_exhaustive()
    }
}

impl Vcpu {
    fn vm(&self) -> MutexGuard<'_, Arc<VmInner>> {
        self.vm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_of(&self, vm: &VmInner) -> bool {
        std::ptr::eq(&**self.vm(), vm)
    }

    fn processor(&self) -> MutexGuard<'_, Option<Box<Processor>>> {
        self.processor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Executes from an entry to the TD exit on logical processor `lp`. Returns the registers that the host gets.
    pub(super) fn run(
        &self,
        platform: &Arc<Platform>,
        lp: usize,
        gprs: Regs,
        injected: Option<Event>,
    ) -> Result<Regs, LpError> {
        let mut processor = self.processor();
        let processor = processor.get_or_insert_with(|| {
            let (vm, apic) = (self.vm(), self.apic.clone());
            let (id, tdvpr) = (self.id, self.tdvpr);
            Box::new(Processor::new(id, tdvpr, &vm, &self.wake, apic, platform))
        });
        processor.run(lp, gprs, injected)
    }
}
