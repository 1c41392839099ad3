//! What a VM keeps of each vCPU, and how all of it goes to the VM to which a guest moves.

use std::sync::{Arc, Mutex, Weak};

use kvm_ops::{Error, Field, Result, Tech, VcpuId};

use crate::handle::lock;
use crate::irq::Wake;
use crate::vcpu::Core;
use crate::vm::VmInner;

/// A vCPU as its VM sees it.
#[derive(Default)]
pub(crate) struct Mailbox {
    pub(crate) wake: Arc<Wake>,
    /// The inside of a vCPU of the machine. Nothing for a TD, whose vCPUs the TDX module has.
    core: Weak<Mutex<Core>>,
    /// The host's part of the local APIC of a TD's vCPU that executes machine code.
    #[allow(dead_code)] // Nothing in a build without TDs.
    pub(crate) apic: Option<Arc<crate::tdx::HostApic>>,
}

impl Mailbox {
    pub(crate) fn new(wake: Arc<Wake>, core: &Arc<Mutex<Core>>) -> Self {
        let core = Arc::downgrade(core);
        Self {
            wake,
            core,
            apic: None,
        }
    }
}

/// The guest of `from` goes on in `to`. None of their vCPUs runs.
pub(crate) fn hand_over(to: &Arc<VmInner>, from: &Arc<VmInner>) -> Result<()> {
    if to.tech != from.tech {
        return kvm_ops::not_offered!("take_guest from a VM of another technology");
    }
    match to.tech {
        Tech::Tdx => {
            // The programs in the module, the processors, and what wakes them, are the TD's.
            *to.vcpus() = std::mem::take(&mut *from.vcpus());
            from.move_home(to);
            from.move_code(to);
            crate::tdx::hand_over(to, from);
        }
        Tech::SevEs | Tech::SevSnp => exchange_cores(to, from)?,
        // The host sees the registers, and the embedder carries them.
        _ => {}
    }
    to.write().take_private(&mut from.write());
    Ok(())
}

/// Encrypted register state goes with the guest: on a processor it lies in the VMSA.
fn exchange_cores(to: &VmInner, from: &VmInner) -> Result<()> {
    if from.sev.owes() {
        return Err(Error::Busy);
    }
    let (there, here) = (to.vcpus(), from.vcpus());
    let mut pairs = Vec::new();
    for (id, source) in &*here {
        let Some(target) = there.get(id) else {
            return Err(Error::NotFound(Field::Vcpu, id.0.into()));
        };
        // A vCPU whose handle is gone has no guest program any more.
        if let (Some(old), Some(new)) = (source.core.upgrade(), target.core.upgrade()) {
            if lock(&old).owes() {
                return Err(Error::Busy);
            }
            pairs.push((old, new));
        }
    }
    for (old, new) in pairs {
        lock(&new).exchange(&mut lock(&old));
    }
    if to.turns.is_parallel() {
        // In turns the processors bring their time.
        to.turns.go_on_from(from.turns.clock());
    }
    to.sev.take_vcpus(&from.sev);
    for (id, source) in &*here {
        if let Some(target) = there.get(id) {
            target.wake.take_events(&source.wake);
        }
    }
    Ok(())
}

/// The mailbox of a TD's vCPU, made on first use.
pub(crate) fn of_td(vm: &VmInner, vcpu: VcpuId) -> Arc<Wake> {
    Arc::clone(&vm.vcpus().entry(vcpu).or_default().wake)
}
