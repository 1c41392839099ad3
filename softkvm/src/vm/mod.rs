//! A VM, and the ioctls of its file.

mod attributes;
mod caps;
mod clock;
mod create_vcpu;
mod dirty_log;
pub(crate) mod gmem;
mod irqchip;
pub(crate) mod lent;
mod msr;
mod no_ops;
mod quirks;
mod region;
mod slots;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::Privacy;
use kvm_ops::sim::MsrExits;
use kvm_ops_mmu::Attributes;
use kvm_ops_uapi::checks::any;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::memory::{ATTRIBUTE_PRIVATE, gmem_flags};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::vm::{MAX_VCPUS, VCPU_ID_RATIO};

pub(crate) use gmem::Gmem;
pub(crate) use irqchip::IrqchipKind;
pub(crate) use quirks::KNOWN_QUIRKS;
pub(crate) use slots::{Slot, Slots};

use crate::irq::{self, Irq};
use crate::machine::Machine;
use crate::refusal::Result;
use crate::sev::Sev;
use crate::system::capabilities;
use crate::tdx::Td;
use crate::vcpu::{Parts, Vcpu};
use crate::{AddressSpace, Kernel, Process, sev, stats, tdx};
use irqchip::Irqchip;
use lent::BackEnd;
use quirks::Quirks;

/// Numbers of vCPUs end here.
pub(crate) const MAX_VCPU_ID: u32 = MAX_VCPUS * VCPU_ID_RATIO;

/// A VM. It lives as long as one of its files.
pub(crate) struct Vm {
    kernel: Kernel,
    kind: u64,
    creator: AddressSpace,
    /// The context moved away: every call answers EIO.
    dead: AtomicBool,
    /// A MOVE or COPY holds the VM.
    claimed: AtomicBool,
    /// Outside of the lock.
    irq: Arc<Irq>,
    msrs: Arc<MsrExits>,
    quirks: Quirks,
    state: Mutex<State>,
}

/// What the VM's lock guards.
pub(crate) struct State {
    /// In front of the back ends, so that they are dropped first.
    pub(crate) vcpus: BTreeMap<u32, Arc<Vcpu>>,
    pub(crate) sev: Sev,
    pub(crate) td: Td,
    /// Of a normal VM with vCPUs, or whose interrupt controllers were used. In front of the slots, whose memory it has.
    machine: Option<Machine>,
    pub(crate) slots: Slots,
    /// How often memory was taken from the guest: a slot, the process' memory behind one, or frames that were private or
    /// shared.
    pub(crate) flushes: u64,
    /// How often memory was lent once more.
    lendings: u64,
    dirty: dirty_log::Logs,
    pub(crate) attributes: Attributes,
    /// Parts of `KVM_GET_VCPU_EVENTS`.
    pub(crate) event_parts: Parts,
    irqchip: Irqchip,
    pub(crate) irq: Arc<Irq>,
    boot_id: u32,
    max_vcpu_id: Option<u32>,
    hypercall_exits: u64,
    clock: clock::Clock,
    tscs: clock::Tscs,
}

impl Vm {
    pub(crate) fn new(kernel: Kernel, kind: u64, creator: AddressSpace) -> Arc<Self> {
        tracing::debug!(kind, "VM created");
        let irq = Arc::<Irq>::default();
        let vm = Arc::new(Self {
            kernel,
            kind,
            creator,
            dead: AtomicBool::new(false),
            claimed: AtomicBool::new(false),
            irq: Arc::clone(&irq),
            msrs: Arc::default(),
            quirks: Quirks::default(),
            state: Mutex::new(State {
                sev: Sev::default(),
                td: Td::default(),
                vcpus: BTreeMap::new(),
                machine: None,
                slots: Slots::default(),
                flushes: 0,
                lendings: 0,
                dirty: dirty_log::Logs::default(),
                attributes: Attributes::new(Privacy::Shared),
                event_parts: Parts::default(),
                irqchip: Irqchip::default(),
                irq,
                boot_id: 0,
                max_vcpu_id: None,
                hypercall_exits: 0,
                clock: clock::Clock::default(),
                tscs: clock::Tscs::default(),
            }),
        });
        vm.kernel.register(&vm);
        vm
    }

    /// The creator takes memory away: see [`Kernel::invalidate`].
    pub(crate) fn invalidate(&self, address: u64, bytes: u64) {
        let mut state = self.lock();
        let met = |slot: &Slot| slot.meets_user_memory(address, bytes);
        let slots = state.slots.iter().filter(|(_, slot)| met(slot));
        let numbers: Vec<u32> = slots.map(|(number, _)| number).collect();
        for number in numbers {
            state.give_up_user_memory(number);
        }
        state.sev.forget_memory(address, bytes);
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn irq(&self) -> &Arc<Irq> {
        &self.irq
    }

    /// User space's say in the guest's MSRs.
    pub(crate) fn msrs(&self) -> &Arc<MsrExits> {
        &self.msrs
    }

    pub(crate) fn quirks(&self) -> &Quirks {
        &self.quirks
    }

    /// Makes the back end of a normal VM, whose interrupt controllers are there without vCPUs.
    pub(crate) fn require_wires(&self) -> Result<()> {
        let mut state = self.lock();
        if self.is_plain() && !state.sev.is_active() {
            state.machine(&self.kernel)?;
        }
        Ok(())
    }

    pub(crate) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    pub(crate) fn kind(&self) -> u64 {
        self.kind
    }

    pub(crate) fn creator(&self) -> AddressSpace {
        self.creator
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub(crate) fn die(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// Claims the VM for a MOVE or COPY. `None` if another has it.
    pub(crate) fn claim(&self) -> Option<Claim<'_>> {
        let was = self.claimed.swap(true, Ordering::AcqRel);
        // Not `then_some`: a claim that is made in vain ends the other's.
        (!was).then(|| Claim(self))
    }

    /// A VM whose guest is no secret, unless it becomes a SEV guest.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self.kind, vm_type::DEFAULT | vm_type::SW_PROTECTED)
    }

    pub(crate) fn has_private_memory(&self) -> bool {
        matches!(
            self.kind,
            vm_type::SW_PROTECTED | vm_type::SNP | vm_type::TDX
        )
    }

    /// Registers of the guest are its secret, by the VM's type.
    pub(crate) fn has_protected_state(&self) -> bool {
        matches!(self.kind, vm_type::SEV_ES | vm_type::SNP | vm_type::TDX)
    }

    pub(crate) fn supported_attributes(&self) -> u64 {
        if self.has_private_memory() {
            ATTRIBUTE_PRIVATE
        } else {
            0
        }
    }

    pub(crate) fn gmem_flags(&self) -> u64 {
        match self.has_private_memory() {
            true => gmem_flags::MMAP,
            false => gmem_flags::MMAP | gmem_flags::INIT_SHARED,
        }
    }

    /// The most vCPUs that it may have.
    pub(crate) fn max_vcpus(&self) -> u32 {
        self.kernel.max_vcpus(self.kind)
    }

    /// Address spaces for slots: the second is that of SMM.
    pub(crate) fn address_spaces(&self) -> u32 {
        if self.has_private_memory() { 1 } else { 2 }
    }
}

impl State {
    /// What a vCPU's TSC becomes by a write, or of a new one; see [`clock::Tscs::synchronise`]. `khz` are the vCPU's own.
    pub(crate) fn synchronise_tsc(
        &mut self,
        written: Option<u64>,
        clock: u64,
        khz: Option<u32>,
    ) -> u64 {
        let khz = khz.unwrap_or_else(|| self.tsc_khz());
        self.tscs.synchronise(written, clock, khz)
    }

    /// What a vCPU's TSC becomes by its offset, which is that of later vCPUs, too.
    pub(crate) fn set_tsc_offset(&mut self, offset: u64, clock: u64, khz: Option<u32>) -> u64 {
        let khz = khz.unwrap_or_else(|| self.tsc_khz());
        self.tscs.set_offset(offset, clock, khz)
    }

    pub(crate) fn tsc_khz(&self) -> u32 {
        self.clock.tsc_khz()
    }

    /// Where the attribute of a frame says that it is private.
    pub(crate) fn is_private(&self, gfn: u64) -> bool {
        self.attributes.get(kvm_ops::Gfn::new(gfn)) == Privacy::Private
    }

    /// True if the hypercall of that number leaves to user space.
    pub(crate) fn leaves(&self, hypercall: u64) -> bool {
        hypercall < 64 && self.hypercall_exits >> hypercall & 1 != 0
    }

    pub(crate) fn irqchip_kind(&self) -> IrqchipKind {
        self.irqchip.kind()
    }

    pub(crate) fn has_pit(&self) -> bool {
        self.irqchip.has_pit()
    }

    pub(crate) fn boot_id(&self) -> u32 {
        self.boot_id
    }

    pub(crate) fn irqchip(&self) -> kvm_ops::Irqchip {
        self.irqchip.place()
    }

    pub(crate) fn has_apics(&self) -> bool {
        self.irqchip.has_apics()
    }

    /// The back end, with all slots. It is made with the first vCPU, or when the interrupt controllers are used.
    fn machine(&mut self, kernel: &Kernel) -> Result<&mut Machine> {
        if self.machine.is_none() {
            let mut machine = Machine::new(kernel.host(), self.irqchip.place(), &self.irq)?;
            let pages = 1 << 40;
            machine.convert((0, pages), &self.slots, &self.attributes)?;
            self.machine = Some(machine);
        }
        self.machine
            .as_mut()
            .ok_or(kvm_ops_uapi::Errno::ENOMEM.into())
    }

    /// The back end whose frames are private where their attribute says so and the slot's file is open: a TD's, or an
    /// SNP guest's.
    pub(crate) fn guarded(&self) -> Option<&BackEnd> {
        self.td.back_end().or_else(|| self.sev.guarded())
    }

    /// A confidential guest's part of a slot that is new, moved or changed.
    fn show_slot(&mut self, number: u32, slot: &Slot) -> Result<()> {
        if let Some(vm) = confidential(&mut self.td, &mut self.sev) {
            lent::set_slot(vm, number, slot)?;
        }
        let range = (slot.gpa, slot.size);
        self.guarded().map_or(Ok(()), |vm| {
            lent::convert(vm, (number, slot), &self.attributes, range)
        })
    }

    /// A confidential guest got its back end, which learns the slots that there are.
    pub(crate) fn show_slots(&mut self) -> Result<()> {
        let slots: Vec<(u32, Slot)> = self
            .slots
            .iter()
            .map(|(number, slot)| (number, slot.clone()))
            .collect();
        let mut slots = slots.iter();
        slots.try_for_each(|(number, slot)| self.show_slot(*number, slot))
    }

    fn hide_slot(&mut self, number: u32) -> Result<()> {
        match confidential(&mut self.td, &mut self.sev) {
            Some(vm) => lent::delete_slot(vm, number),
            None => Ok(()),
        }
    }

    /// The back end's part of a slot that is new, moved or changed. Slots for SMM are not lent.
    fn lend(&mut self, number: u32, slot: &Slot) -> Result<()> {
        match &mut self.machine {
            Some(machine) if number >> 16 == 0 => machine.lend(slot, &self.attributes),
            _ => Ok(()),
        }
    }

    fn take_back(&mut self, number: u32, slot: &Slot) -> Result<()> {
        match &mut self.machine {
            Some(machine) if number >> 16 == 0 => machine.take_back(slot, &self.attributes),
            _ => Ok(()),
        }
    }

    /// Asks the process once more for memory that it did not lend.
    pub(crate) fn lend_again(&mut self, process: &dyn Process, gpa: u64) -> Lending {
        let Some((number, slot)) = self.slots.number_at(0, gpa) else {
            return Lending::Refused;
        };
        if self.machine.is_none() && slot.lent.user.is_some() {
            return Lending::Old(self.lendings);
        }
        let mut slot = slot.clone();
        slot.lent.user = process.lend(slot.hva, slot.size, !slot.is_read_only());
        if slot.memory(Privacy::Shared).is_none() || self.set_there(number, &slot).is_err() {
            return Lending::Refused;
        }
        self.slots.insert(number, slot);
        self.lendings += 1;
        Lending::New
    }

    /// The guest has no part of the process' memory behind a slot any more.
    fn give_up_user_memory(&mut self, number: u32) {
        let Some(slot) = self.slots.get(number) else {
            return;
        };
        let mut slot = slot.clone();
        slot.lent.user = None;
        if let Err(refusal) = self.set_there(number, &slot) {
            tracing::warn!(number, %refusal, "the guest keeps memory that is taken away");
        }
        self.flushes += 1;
        self.slots.insert(number, slot);
    }

    /// Memory of a slot came or went.
    fn set_there(&mut self, number: u32, slot: &Slot) -> Result<()> {
        self.lend(number, slot)?;
        let guarded = self.guarded().is_some();
        match confidential(&mut self.td, &mut self.sev) {
            Some(vm) => {
                let attributes = guarded.then_some(&self.attributes);
                lent::set_there(vm, (number, slot), attributes)
            }
            None => Ok(()),
        }
    }
}

/// The answer of a process that is asked once more for the memory of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lending {
    /// It lends none.
    Refused,
    /// It lends it from now on.
    New,
    /// It lent it before, maybe when another vCPU came to it: so many times it lent memory of the VM once more.
    Old(u64),
}

/// The back end of a TD or a guest of SEV.
fn confidential<'a>(td: &'a mut Td, sev: &'a mut Sev) -> Option<&'a mut BackEnd> {
    td.back_end_mut().or_else(|| sev.back_end_mut())
}

/// The VM is in a MOVE or COPY as long as this lives.
pub(crate) struct Claim<'a>(&'a Vm);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.claimed.store(false, Ordering::Release);
    }
}

pub(crate) fn ioctl(
    vm: &Arc<Vm>,
    process: &dyn Process,
    ioctl: Option<Ioctl>,
    argument: u64,
) -> Result<i64> {
    match ioctl.ok_or(any::KNOWN_ON_VM)? {
        ioctl::KVM_CHECK_EXTENSION => Ok(capabilities::of_vm(vm, argument)),
        ioctl::KVM_CREATE_VCPU => create_vcpu::create(vm, process, argument),
        ioctl::KVM_SET_USER_MEMORY_REGION => region::set_old(vm, process, argument),
        ioctl::KVM_SET_USER_MEMORY_REGION2 => region::set(vm, process, argument),
        ioctl::KVM_GET_DIRTY_LOG => dirty_log::get(vm, process, argument),
        ioctl::KVM_CLEAR_DIRTY_LOG => dirty_log::clear(vm, process, argument),
        ioctl::KVM_CREATE_GUEST_MEMFD => gmem::create(vm, process, argument),
        ioctl::KVM_SET_MEMORY_ATTRIBUTES => attributes::set(vm, process, argument),
        ioctl::KVM_ENABLE_CAP => caps::enable(vm, process, argument),
        ioctl::KVM_CREATE_IRQCHIP => irqchip::create(vm),
        ioctl::KVM_CREATE_PIT2 => irqchip::create_pit(vm, process, argument),
        ioctl::KVM_GET_IRQCHIP => irq::get_chip(vm, process, argument),
        ioctl::KVM_SET_IRQCHIP => irq::set_chip(vm, process, argument),
        ioctl::KVM_GET_PIT2 => irq::get_pit(vm, process, argument),
        ioctl::KVM_SET_PIT2 => irq::set_pit(vm, process, argument),
        ioctl::KVM_SET_GSI_ROUTING => irq::set_routes(vm, process, argument),
        ioctl::KVM_IRQ_LINE => irq::irq_line(vm, process, argument, false),
        ioctl::KVM_IRQ_LINE_STATUS => irq::irq_line(vm, process, argument, true),
        ioctl::KVM_SIGNAL_MSI => irq::signal_msi(vm, process, argument),
        ioctl::KVM_IRQFD => irq::irqfd(vm, process, argument),
        ioctl::KVM_IOEVENTFD => irq::ioeventfd(vm, process, argument),
        ioctl::KVM_REGISTER_COALESCED_MMIO => irq::coalesce(vm, process, argument),
        ioctl::KVM_UNREGISTER_COALESCED_MMIO => irq::do_not_coalesce(vm, process, argument),
        ioctl::KVM_X86_SET_MSR_FILTER => msr::set_filter(vm, process, argument),
        ioctl::KVM_SET_BOOT_CPU_ID => create_vcpu::set_boot_id(vm, argument),
        ioctl::KVM_SET_TSS_ADDR => no_ops::set_tss_addr(argument),
        ioctl::KVM_SET_IDENTITY_MAP_ADDR => no_ops::set_identity_map(vm, process, argument),
        ioctl::KVM_SET_NR_MMU_PAGES => no_ops::set_nr_mmu_pages(argument),
        ioctl::KVM_GET_STATS_FD => stats::open(vm, None, process),
        ioctl::KVM_GET_CLOCK => clock::get(vm, process, argument),
        ioctl::KVM_SET_CLOCK => clock::set(vm, process, argument),
        ioctl::KVM_GET_TSC_KHZ => Ok(vm.lock().tsc_khz().into()),
        ioctl::KVM_SET_TSC_KHZ => clock::set_tsc_khz(vm, argument),
        ioctl::KVM_MEMORY_ENCRYPT_OP if vm.kernel().is_amd() => sev::command(vm, process, argument),
        ioctl::KVM_MEMORY_ENCRYPT_OP => tdx::command(vm, process, argument),
        ioctl::KVM_MEMORY_ENCRYPT_REG_REGION => sev::register(vm, process, argument),
        ioctl::KVM_MEMORY_ENCRYPT_UNREG_REGION => sev::unregister(vm, process, argument),
        _ => Err(any::KNOWN_ON_VM.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::Vendor;
    use kvm_ops::sim::SimHost;

    #[test]
    fn a_claim_that_is_refused_leaves_the_other_standing() {
        let kernel = Kernel::new(SimHost::new(Vendor::Intel));
        let vm = Vm::new(kernel, vm_type::DEFAULT, AddressSpace(1));
        let claim = vm.claim();
        assert!(claim.is_some());
        assert!(vm.claim().is_none());
        assert!(vm.claim().is_none(), "the first one stands");
        drop(claim);
        assert!(vm.claim().is_some());
    }
}
