//! A vCPU that executes machine code: a processor of `kvm-ops-cpu`, between two exits.

mod bus;
mod cpuid;
mod events;
mod exits;
mod gate;
mod groups;
mod mmio;
mod msr;
#[cfg_attr(not(any(feature = "tdx", feature = "sev")), allow(dead_code))]
// Only confidential VMs execute in an order.
mod order;
mod parallel;
mod routing;
mod state;
mod turns;

pub(crate) use mmio::Access;
pub(crate) use msr::MsrWait;
pub(crate) use routing::{Command, Kind, Processors, To};
pub(crate) use turns::{Place, Sleeper, Turn, Turns};

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvm_ops::guest::MAX_ACCESS;
use kvm_ops::{Exception, Exit, Irqchip, Result, VcpuId};
use kvm_ops_cpu::{Activity, ApicAddress, Controls, Cpu, Exit as CpuExit, Stopped};

use crate::chips::Pin;
use crate::irq::{self, Wake};
use crate::msr_exits::MsrExits;
use crate::sev;
use crate::vm::VmInner;
use crate::wires::Ended;

/// Instructions of a turn. A kick or a change of memory slots waits for one at most, which takes
/// some 0.1 ms, or 0.1 s if all of them are repeated string instructions.
const QUANTUM: u64 = 20_000;

/// Turns after which decoded code is compared with memory, in case another thread of the host wrote
/// it. It is compared after every exit anyway.
const TRUSTED_TURNS: u32 = 50;

/// A processor of a VM.
pub(crate) struct Processor {
    pub(crate) id: VcpuId,
    pub(crate) vm: Arc<VmInner>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) cpu: Cpu,
    pub(crate) shared: Arc<bus::Shared>,
    pub(crate) resume: Resume,
    /// An access to ports with its answer, whose memory operand is a device's.
    port: Option<Port>,
    /// An access of the instruction at RIP was answered: the instruction goes on before any event.
    midway: bool,
    /// Delivered at the next entry.
    exception: Option<Exception>,
    triple_fault: bool,
    /// The embedder wants to know when an interrupt can be taken.
    window: bool,
    /// No INIT came yet: tells the two states in which a processor waits.
    pub(crate) uninitialized: bool,
    joined: bool,
    /// Turns since decoded code was compared with memory.
    turns: u32,
    address: Option<ApicAddress>,
    /// Instructions that the machine's count has.
    counted: u64,
    /// The next change of a timer of the platform, as of the last turn.
    timer: Option<u64>,
    /// The embedder's say in RDMSR and WRMSR.
    pub(crate) msr_exits: Option<Arc<MsrExits>>,
    /// While true, the other vendor's hypercall instruction becomes the own one.
    pub(crate) hypercall_fix: Option<Arc<AtomicBool>>,
    /// Told of HLT instructions after which the processor waits here.
    pub(crate) halt_hook: HaltHook,
    /// The instructions that it was told of.
    halts: u64,
    /// For a guest with encrypted memory.
    pub(crate) sev: Option<Box<sev::Side>>,
}

/// The rest of the work of the last exit, done when the processor runs again.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Resume {
    Nothing,
    /// With the number of items.
    Port(CpuExit, u32),
    Device(mmio::Access),
    Call(CpuExit),
    Msr(MsrWait),
    /// Of an encrypted guest's.
    #[allow(dead_code)] // Never in a build without SEV.
    Sev(sev::Pending),
}

/// An access to ports, and the items that are left of its answer, in order.
struct Port {
    exit: CpuExit,
    items: VecDeque<u32>,
}

/// Called with the number of new HLT instructions.
#[derive(Default)]
pub(crate) struct HaltHook(pub(crate) Option<Box<dyn Fn(u64) + Send + Sync>>);

impl HaltHook {
    pub(crate) fn call(&self, halts: u64) {
        if let Some(hook) = self.0.as_ref().filter(|_| halts != 0) {
            hook(halts);
        }
    }
}

/// The result of a turn.
pub(crate) enum Next {
    Again,
    Sleep(Option<u64>),
    Leave(Exit, Vec<u8>),
    /// What the processor asks for is done while no other one executes.
    Alone,
    /// An exit of an encrypted guest, which is handled when the turn is over: its back end is asked.
    #[allow(dead_code)] // Never in a build without SEV.
    Outside(CpuExit),
}

impl Processor {
    pub(crate) fn new(id: VcpuId, vm: &Arc<VmInner>, wake: &Arc<Wake>) -> Self {
        let shared = Arc::<bus::Shared>::default();
        let bus = bus::VmBus {
            vm: Arc::clone(vm),
            shared: Arc::clone(&shared),
        };
        let has_apic = vm.irqchip() != Irqchip::None;
        let cpuid = sev::cpuid(vm, cpuid::table(vm.machine.vendor, has_apic));
        let (bus, sev) = sev::surround(vm, bus);
        let mut cpu = Cpu::new(bus, vm.code_pages(), cpuid);
        cpu.set_parallel(vm.turns.is_parallel());
        cpu.set_apic_id(id.0);
        let controls = Controls {
            io: true,
            hlt: !has_apic,
            hypercalls: true,
            ..Controls::none()
        };
        *cpu.controls_mut() = sev::controls(vm, controls);
        if !has_apic {
            cpu.remove_apic();
        }
        let mut processor = Self {
            id,
            vm: Arc::clone(vm),
            wake: Arc::clone(wake),
            cpu,
            shared,
            resume: Resume::Nothing,
            port: None,
            midway: false,
            exception: None,
            triple_fault: false,
            window: false,
            uninitialized: true,
            joined: false,
            turns: 0,
            address: None,
            counted: 0,
            timer: None,
            msr_exits: None,
            hypercall_fix: None,
            halt_hook: HaltHook::default(),
            halts: 0,
            sev,
        };
        processor.power_on();
        processor
    }

    pub(crate) fn has_apic(&self) -> bool {
        self.vm.irqchip() != Irqchip::None
    }

    /// True for the processor that boots, to which the 8259A pair is connected.
    pub(crate) fn boots(&self) -> bool {
        self.id.0 == 0
    }

    /// The processor that boots starts at once. Others wait for it, if they have a local APIC
    /// through which it can start them.
    fn power_on(&mut self) {
        let boots = self.boots();
        if boots && self.vm.irqchip() == Irqchip::Full {
            self.cpu.connect_pic();
        }
        self.uninitialized = true;
        self.change_activity(|activity| activity.waiting = !boots);
    }

    /// Changes the activity. Nothing ever starts a processor that waits without a local APIC.
    pub(crate) fn change_activity(&mut self, change: impl FnOnce(&mut Activity)) {
        let mut activity = self.cpu.activity();
        change(&mut activity);
        activity.waiting &= self.has_apic();
        self.cpu.set_activity(activity);
    }

    /// After power-on, or after INIT.
    pub(crate) fn reset(&mut self, init: bool) {
        self.give_up();
        (self.window, self.triple_fault) = (false, false);
        self.exception = None;
        if init {
            self.cpu.init();
            self.uninitialized = false;
            self.change_activity(|_| ());
        } else {
            self.cpu.reset();
            self.power_on();
        }
    }

    /// Instructions executed so far.
    pub(crate) fn instructions(&self) -> u64 {
        self.cpu.retired()
    }

    /// Runs until the embedder is needed. `buffer` has the answer to the last exit, and its data
    /// afterwards: as many bytes as are returned.
    pub(crate) fn run(&mut self, buffer: &mut [u8; MAX_ACCESS], ret: u64) -> Result<(Exit, usize)> {
        if !self.joined {
            self.joined = true;
            self.vm.turns.join(self.id.0);
        }
        self.vm.require_open()?;
        if let Some(refused) = self.load_vmsa()? {
            return Ok((refused, 0));
        }
        self.finish_exit(buffer, ret);
        self.recheck_code();
        let left = self.run_inside(buffer);
        self.store_vmsa()?;
        left
    }

    fn run_inside(&mut self, buffer: &mut [u8; MAX_ACCESS]) -> Result<(Exit, usize)> {
        let vm = Arc::clone(&self.vm);
        // The place for the next turn, taken in the last one.
        let mut place: Option<Place<'_>> = None;
        loop {
            self.vm.require_open()?;
            // An instruction whose accesses were answered is finished first.
            if !self.midway && self.port.is_none() && self.wake.take_kick() {
                return Ok((Exit::Interrupted, 0));
            }
            let Some(share) = self.share() else { continue };
            let mut next = match self.take_work()? {
                Some(next) => {
                    self.spend(0, false);
                    next
                }
                None => {
                    let turn = place
                        .take()
                        .map_or_else(|| vm.turns.take_to_execute(), Place::wait);
                    let next = self.turn(&turn, share);
                    // The work between turns of a processor with encrypted registers has turns, too.
                    if matches!(next, Next::Again) && self.sev.is_none() {
                        place = turn.queue_again();
                    }
                    next
                }
            };
            while matches!(next, Next::Alone) {
                next = self.run_alone();
            }
            while let Next::Outside(exit) = next {
                next = self.outside(exit)?;
            }
            match next {
                Next::Again | Next::Outside(_) | Next::Alone => {}
                Next::Sleep(until) => {
                    if !self.sleep(until) {
                        return Ok((Exit::Interrupted, 0));
                    }
                }
                Next::Leave(exit, data) => {
                    buffer[..data.len()].copy_from_slice(&data);
                    return Ok((exit, data.len()));
                }
            }
        }
    }

    /// Sleeps until then, or until a message comes. Returns false if a kick ended it.
    fn sleep(&self, until: Option<u64>) -> bool {
        if let Some(now) = self.vm.turns.host_clock() {
            return self.sleep_on_host(now, until);
        }
        let sleeper = Sleeper {
            until,
            wake: Arc::clone(&self.wake),
            hears: irq::State::has_mail,
        };
        self.vm.turns.sleep(self.id.0, sleeper);
        let woken = self.wake.wait(irq::State::any_mail);
        self.vm.turns.rise(self.id.0);
        woken.is_some()
    }

    /// True for a processor that executes in an order with the others of its VM, so that a run is the same each time.
    fn is_in_order(&self) -> bool {
        self.sev.is_some() && self.has_apic() && !self.vm.turns.is_parallel()
    }

    /// The instructions of the next turn. `None` if it is not the processor's turn yet.
    fn share(&self) -> Option<u64> {
        match self.is_in_order() {
            true => self.vm.turns.share(self.id.0),
            false => Some(QUANTUM),
        }
    }

    /// The processor has executed that many instructions of its share.
    fn spend(&self, instructions: u64, paused: bool) {
        if self.is_in_order() {
            self.vm.turns.spend(self.id.0, instructions, paused);
        }
    }

    /// One turn: time, messages, events, instructions.
    fn turn(&mut self, turn: &Turn<'_>, share: u64) -> Next {
        let before = self.cpu.retired();
        if self.sev.is_none() {
            self.cpu.controls_mut().msr = self.watches_msrs();
        }
        self.cpu.advance_to(turn.clock());
        self.turns += 1;
        if self.turns > TRUSTED_TURNS {
            self.recheck_code();
        }
        let timer = self.look_at_chips();
        turn.set_timer(timer);
        self.timer = timer;
        self.take_mail();
        let next = match self.port.take() {
            Some(port) => Some(self.complete_port(port)),
            None => self
                .take_interrupted()
                .and_then(|event| self.deliver(event))
                .or_else(|| self.inject()),
        };
        let (next, paused) = match next {
            Some(next) => (next, false),
            None => {
                // A timer of the platform interrupts at its very tick, however turns are cut.
                let until_timer = timer.map_or(u64::MAX, |at| at.saturating_sub(self.cpu.clock()));
                let stopped = self.execute(until_timer.clamp(1, QUANTUM.min(share)), turn);
                (self.stopped(stopped), matches!(stopped, Stopped::Paused))
            }
        };
        self.count();
        turn.pass_time(self.cpu.clock());
        self.spend(self.cpu.retired().wrapping_sub(before), paused);
        self.publish();
        next
    }

    /// The embedder may have written memory: decoded code is compared with it. The code of an encrypted guest is
    /// private, and nobody writes such a page without taking it back first.
    fn recheck_code(&mut self) {
        self.turns = 0;
        if self.sev.is_none() {
            self.cpu.recheck_code();
        }
    }

    fn count(&mut self) {
        let executed = self.cpu.retired();
        let since = executed.wrapping_sub(self.counted);
        self.vm.machine.executed(since);
        self.counted = executed;
        let halts = self.cpu.halts();
        self.halt_hook.call(halts.wrapping_sub(self.halts));
        self.halts = halts;
    }

    /// Lets the processor work in a turn of its own, outside of which it leaves memory alone.
    #[allow(dead_code)] // For the exits of encrypted guests.
    pub(crate) fn in_turn<T>(&mut self, work: impl FnOnce(&mut Cpu) -> T) -> T {
        let vm = Arc::clone(&self.vm);
        let turn = vm.turns.take_to_execute();
        self.cpu.advance_to(turn.clock());
        let result = self.in_memory(work);
        self.count();
        turn.pass_time(self.cpu.clock());
        result
    }

    /// Lets the processor use memory, in a turn of the VM to execute in.
    pub(crate) fn in_memory<T>(&mut self, work: impl FnOnce(&mut Cpu) -> T) -> T {
        self.with_memory(self.vm.turns.is_parallel(), work)
    }

    /// Tells who wants to know of the ends of interrupts; `vectors` ended at the local APIC.
    fn tell_ends(&self, vectors: impl Iterator<Item = u8>) {
        let (vm, id) = (&self.vm, self.id.0);
        match vm.chips() {
            Some(_) if !vm.end_hook.is_set() => {}
            // Those of the pins are told in front of the chips, which look at the pin again.
            Some(mut chips) => {
                let ended = chips.take_ended();
                let ending = vectors.flat_map(|vector| chips.ending(vector));
                let pins: Vec<Pin> = ended.chain(ending).collect();
                drop(chips);
                pins.into_iter()
                    .for_each(|pin| vm.end_hook.call(id, Ended::Pin(pin)));
            }
            None => vectors.for_each(|vector| vm.end_hook.call(id, Ended::Vector(vector))),
        }
    }

    /// Tells the chips the time and the ends of interrupts. Returns the time of their next interrupt.
    fn look_at_chips(&mut self) -> Option<u64> {
        let ended = self.shared.take_ended();
        self.tell_ends(ended.clone());
        let mut chips = self.vm.chips()?;
        ended.for_each(|vector| chips.end(vector));
        chips.advance(self.cpu.clock());
        let next = chips.next();
        self.vm.send_from(chips);
        next
    }

    fn execute(&mut self, budget: u64, turn: &Turn<'_>) -> Stopped {
        self.shared.mmio().begin();
        if std::mem::take(&mut self.midway) {
            return self.in_memory(Cpu::finish_instruction);
        }
        if self.vm.turns.is_parallel() {
            return self.execute_beside_others(turn);
        }
        let end = self.cpu.clock().saturating_add(budget);
        loop {
            let left = end.saturating_sub(self.cpu.clock());
            match self.in_memory(|cpu| cpu.run(left.max(1))) {
                // Who pauses goes on if no other processor wants the turn.
                Stopped::Paused
                    if self.cpu.clock() < end && !self.is_in_order() && !turn.is_wanted() => {}
                stopped => return stopped,
            }
        }
    }

    /// Tells other processors the names of the local APIC.
    pub(crate) fn publish(&mut self) {
        let address = self.cpu.apic_address();
        if self.has_apic() && self.address != Some(address) {
            self.address = Some(address);
            let mut processors = self.vm.processors();
            processors.set(self.id.0, address, &self.wake);
        }
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        for (instruction, count) in self.cpu.missing() {
            let vcpu = self.id.0;
            tracing::warn!(vcpu, %instruction, count, "not implemented: #UD");
        }
        if self.joined {
            self.vm.turns.part(self.id.0);
        }
    }
}

impl fmt::Debug for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Processor")
            .field("id", &self.id)
            .field("rip", &format_args!("{:#x}", self.cpu.rip()))
            .field("instructions", &self.cpu.retired())
            .finish_non_exhaustive()
    }
}
