//! A TD's vCPU that executes machine code: a processor of `kvm-ops-cpu` inside of TDH.VP.ENTER.
//!
//! | file | what it does |
//! |---|---|
//! | `bus` | pages: the Secure-EPT, and the slots for shared addresses |
//! | `exits` | each exit of the processor, as the event that the module handles |
//! | `msr` | RDMSR and WRMSR that do not leave the TD |
//! | `posted` | interrupts of the host: taken over into the virtual APIC page |
//! | `registers` | VMCS and TDVPS, loaded at an entry and saved before an event |

mod bus;
mod exits;
mod msr;
mod posted;
mod registers;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_ops::VcpuId;
use kvm_ops_cpu::{Activity, Controls, Cpu, CpuidTable, Exit as CpuExit, Stopped};
use soft_tdx_module::{
    CpuidAnswer, Event, GuestEvent, GuestFlow, LpError, Platform, ProcessorState, Regs, VmExit,
};

use crate::irq::Wake;
use crate::processor::{Sleeper, Turn};
use crate::tdx::HostApic;
use crate::vm::VmInner;
use bus::{Shared, TdBus, insist};

/// Turns between two interrupts of the host's timer.
const TURNS_PER_ENTRY: u32 = 50;

/// Instructions of a turn of a processor that executes beside others: whoever wants to be alone, and a kick, wait for one.
const SLICE: u64 = 2_000;
/// Such turns between two interrupts of the host's timer.
const SLICES_PER_ENTRY: u32 = 500;

/// IA32_APIC_BASE of a TD: x2APIC mode; and the bit of the processor that boots.
const X2APIC: u64 = 0xfee0_0c00;
const BOOTS: u64 = 1 << 8;

/// The x2APIC's spurious-interrupt vector register, and its bit that enables the APIC.
const SPURIOUS_VECTOR: u32 = 0x80f;
const ENABLED: u64 = 1 << 8;

const REASON_TRIPLE_FAULT: u16 = 2;
const REASON_NMI_WINDOW: u16 = 8;

/// RAX of an exit by TDG.VP.VMCALL, and its sub-function for HLT.
const REASON_TDCALL: u64 = 77;
const CALL_HLT: u64 = 12;

pub(super) struct Processor {
    id: VcpuId,
    tdvpr: u64,
    wake: Arc<Wake>,
    /// The rest of the local APIC, whose interrupts are posted. `None` without APICs in the platform.
    apic: Option<Arc<HostApic>>,
    platform: Arc<Platform>,
    cpu: Cpu,
    shared: Arc<Shared>,
    /// The numbers that the generation of the bus stands for.
    seen: Seen,
    /// The TLB epoch of the last entry.
    epoch: u64,
    /// How often the module had written to the TD's frames.
    written: u64,
    /// What the module was given, or gave, last.
    known: Option<ProcessorState>,
    /// The bits of CR0 and CR4 that are the module's.
    masks: (u64, u64),
    /// The TDCALL that the next entry completes.
    calling: Option<CpuExit>,
    /// An exit that came up while an event was delivered.
    next: Option<CpuExit>,
    /// MSRs of a TD that neither the processor nor the module has a place for.
    msrs: BTreeMap<u32, u64>,
    /// Instructions that the machine's count has.
    counted: u64,
}

/// Numbers that change with translations: frames taken back, the TLB epoch of the last entry, slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    closed: u64,
    epoch: u64,
    slots: u64,
}

/// The result of a step: `Some` has the registers of a TD exit.
type Left = Result<Option<Regs>, LpError>;

impl Processor {
    pub(super) fn new(
        id: VcpuId,
        tdvpr: u64,
        vm: &Arc<VmInner>,
        wake: &Arc<Wake>,
        apic: Option<Arc<HostApic>>,
        platform: &Arc<Platform>,
    ) -> Self {
        if let Some(apic) = &apic {
            apic.set_ticks(input_clock(platform, tdvpr));
        }
        let shared = Arc::new(Shared::new(vm));
        let bus = TdBus::new(platform, &shared);
        let mut cpu = Cpu::new(Box::new(bus), vm.code_pages(), cpuid());
        cpu.set_parallel(vm.turns.is_parallel());
        cpu.set_apic_id(id.0);
        cpu.set_apic_base(X2APIC | if id.0 == 0 { BOOTS } else { 0 });
        // Interrupts are delivered whatever the guest tells its APIC, which is the host's to emulate but for the
        // registers that delivery uses.
        let _ = cpu.write_msr(SPURIOUS_VECTOR, ENABLED | 0xff);
        // All vCPUs of a TD start by themselves.
        cpu.set_activity(Activity::default());
        *cpu.controls_mut() = Controls {
            control_registers: true,
            ..Controls::confidential()
        };
        Self {
            id,
            tdvpr,
            wake: Arc::clone(wake),
            apic,
            platform: Arc::clone(platform),
            cpu,
            shared,
            seen: Seen::default(),
            epoch: 0,
            written: 0,
            known: None,
            masks: (0, 0),
            calling: None,
            next: None,
            msrs: BTreeMap::new(),
            counted: 0,
        }
    }

    /// The TD is another VM's. No pointer to the slots of the old one is used any more.
    pub(super) fn move_to(&mut self, vm: &Arc<VmInner>) {
        self.shared.set_vm(vm);
        self.shared.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Instructions executed so far.
    pub(super) fn instructions(&self) -> u64 {
        self.cpu.retired()
    }

    fn lp(&self) -> usize {
        self.shared.lp.load(Ordering::Relaxed)
    }

    /// Executes from an entry to the TD exit.
    pub(super) fn run(
        &mut self,
        lp: usize,
        gprs: Regs,
        injected: Option<Event>,
    ) -> Result<Regs, LpError> {
        self.shared.lp.store(lp, Ordering::Relaxed);
        let vm = self.shared.vm();
        vm.turns.rise(self.id.0);
        self.enter(&gprs)?;
        if let Some(event) = injected {
            self.deliver(event)?;
        }
        let turns = match vm.turns.is_parallel() {
            true => SLICES_PER_ENTRY,
            false => TURNS_PER_ENTRY,
        };
        for _ in 0..turns {
            if let Some(host) = self.step()? {
                return Ok(host);
            }
        }
        loop {
            // What came up meanwhile is the module's to keep: the next entry may be another host's.
            let left = match self.next.take() {
                Some(exit) => self.exit(exit)?,
                None => self.play(timer(), None)?,
            };
            if let Some(host) = left {
                return Ok(host);
            }
        }
    }

    /// Loads what the module has, and completes the TDCALL that left.
    fn enter(&mut self, gprs: &Regs) -> Result<(), LpError> {
        let state = insist(|| self.platform.guest_registers(self.lp()))?;
        if self.known.is_none() {
            registers::load_virtual_apic(&mut self.cpu, &state.virtual_apic);
        }
        if let Some(area) = self.platform.changed_extended_state(self.tdvpr) {
            // A debugger may leave what no processor can hold.
            let _ = self.cpu.load_xsave(&area);
        }
        self.masks = insist(|| self.platform.guest_control_masks(self.lp()))?;
        let call = self.calling.take();
        let stepped = |known: &ProcessorState, call: &CpuExit| {
            known.rip.wrapping_add(call.len.into()) == state.rip
        };
        match (&self.known, call) {
            (Some(known), Some(call)) if stepped(known, &call) => {
                self.cpu.skip(&call);
                self.sync(&state);
            }
            _ => self.sync(&state),
        }
        registers::set_gprs(&mut self.cpu, gprs);
        self.epoch = insist(|| self.platform.guest_epoch(self.lp()))?;
        Ok(())
    }

    /// Takes over what differs from what the module was given last.
    fn sync(&mut self, state: &ProcessorState) {
        let same = self.known.as_ref().is_some_and(|known| {
            let rip = state.rip;
            ProcessorState {
                rip,
                ..known.clone()
            } == *state
        });
        match same {
            true => self.cpu.set_rip(state.rip),
            false => registers::load(&mut self.cpu, state),
        }
        self.known = Some(state.clone());
    }

    /// What comes before the next instruction, then a turn.
    fn step(&mut self) -> Left {
        if let Some(exit) = self.next.take() {
            return self.exit(exit);
        }
        if let Some(event) = self.interruption()? {
            return self.play(event, None);
        }
        // The host leaves an NMI with the module, which it can do while the vCPU is outside.
        if self.apic.is_some() && self.wake.has_nmi() {
            return self.play(timer(), None);
        }
        let vm = self.shared.vm();
        let mut stopped = match vm.turns.is_parallel() {
            true => self.execute(SLICE)?,
            false => self.execute_in_order(&vm)?,
        };
        while matches!(stopped, Stopped::Alone) {
            stopped = self.in_turn_of(&vm.turns.take(), Cpu::run_alone)?;
        }
        match stopped {
            Stopped::Exit(exit) => self.exit(exit),
            Stopped::Paused if vm.turns.is_parallel() => {
                // The one that it waits for may need the host's processor.
                std::thread::yield_now();
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// Executes in the vCPU's share of the TD's time.
    fn execute_in_order(&mut self, vm: &VmInner) -> Result<Stopped, LpError> {
        let Some(share) = vm.turns.share(self.id.0) else {
            return Ok(Stopped::Budget);
        };
        let before = self.cpu.retired();
        let stopped = self.execute(share);
        let executed = self.cpu.retired().wrapping_sub(before);
        let pauses = matches!(stopped, Ok(Stopped::Paused));
        vm.turns.spend(self.id.0, executed, pauses);
        stopped
    }

    /// Executes so many instructions, or up to the next interrupt of the timer.
    fn execute(&mut self, share: u64) -> Result<Stopped, LpError> {
        let (apic, wake) = (self.apic.clone(), Arc::clone(&self.wake));
        self.in_turn(|cpu| {
            let budget = posted::until_timer(apic.as_deref(), cpu.clock());
            posted::take(&wake, cpu);
            cpu.run(budget.min(share))
        })
    }

    /// An interrupt of the host. For an NMI that waits with the module the processor leaves as soon as it can take it.
    fn interruption(&mut self) -> Result<Option<VmExit>, LpError> {
        let event = insist(|| self.platform.guest_interruption(self.lp()))?;
        let nmi_waits = event.is_some_and(|event| event.reason == REASON_NMI_WINDOW);
        self.cpu.controls_mut().nmi_window = nmi_waits;
        Ok(event.filter(|_| !nmi_waits))
    }

    /// Lets the processor work in a turn of the VM and of the TD's memory, beside others if they execute at the same time.
    fn in_turn<T>(&mut self, work: impl FnOnce(&mut Cpu) -> T) -> Result<T, LpError> {
        let vm = self.shared.vm();
        self.in_turn_of(&vm.turns.take_to_execute(), work)
    }

    /// Lets the processor work in this turn of the VM, and one of the TD's memory: the VM's is taken first, by everybody.
    fn in_turn_of<T>(
        &mut self,
        turn: &Turn<'_>,
        work: impl FnOnce(&mut Cpu) -> T,
    ) -> Result<T, LpError> {
        let (vm, platform, lp) = (self.shared.vm(), Arc::clone(&self.platform), self.lp());
        let memory = insist(|| match turn.is_shared() {
            true => platform.guest_turn_shared(lp),
            false => platform.guest_turn(lp),
        })?;
        let seen = Seen {
            closed: memory.closed(),
            epoch: self.epoch,
            slots: vm.generation(),
        };
        if seen != self.seen {
            self.seen = seen;
            self.shared.generation.fetch_add(1, Ordering::Relaxed);
        }
        // All code is private, so nobody else writes it: other vCPUs tell the pages that they share.
        if memory.written() != self.written {
            self.written = memory.written();
            self.cpu.recheck_code();
        }
        self.cpu.advance_to(turn.clock());
        let result = work(&mut self.cpu);
        drop(memory);
        turn.pass_time(self.cpu.clock());
        let executed = self.cpu.retired();
        vm.machine.executed(executed.wrapping_sub(self.counted));
        self.counted = executed;
        Ok(result)
    }

    /// Saves the registers and plays a VM exit. `exit` is that of the instruction that caused it.
    fn play(&mut self, event: VmExit, exit: Option<CpuExit>) -> Left {
        self.play_event(GuestEvent::Exit(event), exit)
    }

    fn play_event(&mut self, event: GuestEvent, exit: Option<CpuExit>) -> Left {
        let gprs = self.save()?;
        let flow = insist(|| self.platform.guest_event(self.lp(), gprs, event, 0))?;
        tracing::trace!(
            technology = "tdx",
            vcpu = self.id.0,
            rip = format_args!("{:#x}", self.cpu.rip()),
            ?event,
            ?flow,
            "event of the guest"
        );
        self.follow(flow, exit)
    }

    /// Gives the registers to the module. Returns the general ones.
    fn save(&mut self) -> Result<Regs, LpError> {
        let (gprs, state) = (registers::gprs(&self.cpu), registers::save(&self.cpu));
        insist(|| self.platform.set_guest_registers(self.lp(), &gprs, &state))?;
        self.known = Some(state);
        Ok(gprs)
    }

    /// Does what the module says after an event.
    fn follow(&mut self, mut flow: GuestFlow, exit: Option<CpuExit>) -> Left {
        loop {
            match flow {
                GuestFlow::Exit { host } => {
                    self.calling = exit;
                    // A TD that is lost has nowhere to save it.
                    let area = self.cpu.save_xsave();
                    self.platform.save_extended_state(self.tdvpr, &area);
                    self.sleep_if_it_halts(&host);
                    if let Some(apic) = &self.apic {
                        let held =
                            |state: &ProcessorState| posted::is_deliverable(&state.virtual_apic);
                        apic.note_deliverable(self.known.as_ref().is_some_and(held));
                    }
                    return Ok(Some(host));
                }
                // An L2 VM has no processor: it shuts down at once, and L1 goes on.
                GuestFlow::Resume { guest, vm, .. } if vm != 0 => {
                    let event = GuestEvent::Exit(VmExit {
                        reason: REASON_TRIPLE_FAULT,
                        ..VmExit::default()
                    });
                    flow = insist(|| self.platform.guest_event(self.lp(), guest, event, 0))?;
                }
                GuestFlow::Resume {
                    guest,
                    injected,
                    completed,
                    ..
                } => {
                    registers::set_gprs(&mut self.cpu, &guest);
                    if let Some(exit) = exit.filter(|_| completed) {
                        self.cpu.skip(&exit);
                        if exits::changes_registers(&exit) {
                            self.reload()?;
                        }
                    }
                    if let Some(event) = injected {
                        self.deliver(event)?;
                    }
                    return Ok(None);
                }
            }
        }
    }

    /// Without a local APIC in the platform the embedder sees a halt, and time passes without the vCPU until it is
    /// entered again.
    fn sleep_if_it_halts(&self, host: &Regs) {
        let halts = (host.rax, host.r10, host.r11) == (REASON_TDCALL, 0, CALL_HLT);
        if halts && self.apic.is_none() {
            let sleeper = Sleeper {
                until: None,
                wake: Arc::clone(&self.wake),
                hears: |state| state.ends_halt(false),
            };
            self.shared.vm().turns.sleep(self.id.0, sleeper);
        }
    }

    /// Delivers an event through the guest's interrupt table, as a VM entry does.
    fn deliver(&mut self, event: Event) -> Result<(), LpError> {
        let event = exits::cpu_event(&event);
        self.next = self.in_turn(|cpu| cpu.inject(event))?;
        Ok(())
    }
}

/// The processor's own features: the guest sees those that the module virtualises. Addresses have 52 bits, of which the
/// TD's width is the module's to check.
fn cpuid() -> CpuidTable {
    const ADDRESSES: u32 = 0x8000_0008;
    const WIDTH: u32 = 0xff;
    let mut table = CpuidTable::intel();
    let mut leaf = table.get(ADDRESSES, 0);
    leaf.eax = leaf.eax & !WIDTH | 52;
    table.set(ADDRESSES, 0, leaf);
    table
}

/// Clock ticks of the APIC timer's input clock: the ratio of the TSC to the crystal in CPUID leaf 15H.
pub(super) fn input_clock(platform: &Platform, tdvpr: u64) -> u64 {
    match platform.guest_cpuid(tdvpr, 0x15, 0, 0) {
        Some(CpuidAnswer::Values([per, ticks, ..])) => u64::from(ticks / per.max(1)),
        _ => 1,
    }
}

/// The host's timer interrupts.
fn timer() -> VmExit {
    const EXTERNAL_INTERRUPT: u16 = 1;
    const VALID_VECTOR_32: u64 = 0x8000_0020;
    VmExit {
        reason: EXTERNAL_INTERRUPT,
        info: VALID_VECTOR_32,
        ..VmExit::default()
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        let r = self.cpu.registers();
        tracing::debug!(
            technology = "tdx",
            vcpu = self.id.0,
            rip = format_args!("{:#x}", r.rip),
            rsp = format_args!("{:#x}", r.gpr[4]),
            rflags = format_args!("{:#x}", r.rflags),
            cr3 = format_args!("{:#x}", r.cr3),
            instructions = self.cpu.retired(),
            "the processor of a TD's vCPU is gone"
        );
        for (instruction, count) in self.cpu.missing() {
            let vcpu = self.id.0;
            tracing::warn!(technology = "tdx", vcpu, %instruction, count, "not implemented: #UD");
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
