//! Real firmware in a trust domain: TDVF from its reset vector to the boot manager, on the software platform.
//!
//! The image is `OVMF.inteltdx.ms.fd` of Debian's package ovmf-inteltdx (2026.08), or the file that the environment
//! variable `KVM_OPS_TDVF` names. Debian 12 does not have it, and its OVMF.fd passes RBP in TDG.VP.VMCALL, which no TD
//! of this back end (nor of KVM) allows.
#![cfg(target_arch = "x86_64")]

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kvm_ops::sim::SimHost;
use kvm_ops::{Answer, EncParams, Exit, Gpa, InitialPageKind, Kind, TdParams, Tech, Vendor};
use kvm_ops_machine::{
    ConsoleSink, Devices, End, ExitContext, ExitHandler, Flow, LaunchPage, LaunchStep, Machine,
    MachineConfig, RunLimits,
};
use kvm_ops_tdvf::{Order, PageAdd, SectionKind, Step, Tdvf};

const MEMORY: u64 = 256 << 20;
const PROMPT: &str = "Press any key to enter the Boot Manager Menu";

/// Memory that is accepted before the firmware starts, and memory that it must accept (UEFI PI, vol. 3,
/// "Resource Descriptor HOB").
const SYSTEM_MEMORY: u32 = 0;
const UNACCEPTED: u32 = 7;

/// The hand-off block at `at`: a header, the pieces of memory, and an end.
fn hand_off_block(at: u64, accepted: &[(u64, u64)]) -> Vec<u8> {
    let mut pieces = Vec::new();
    let mut piece = |kind: u32, from: u64, to: u64| {
        if from < to {
            pieces.extend(header(3, 48));
            pieces.extend([0; 16]);
            // Present, initialised, tested.
            pieces.extend([kind, 7].map(u32::to_le_bytes).as_flattened());
            pieces.extend([from, to - from].map(u64::to_le_bytes).as_flattened());
        }
    };
    let mut next = 0;
    for (from, to) in accepted {
        piece(UNACCEPTED, next, *from);
        piece(SYSTEM_MEMORY, *from, *to);
        next = *to;
    }
    piece(UNACCEPTED, next, MEMORY);
    let mut block = header(1, 56);
    let version_and_mode = [9u32, 0];
    block.extend(version_and_mode.map(u32::to_le_bytes).as_flattened());
    let end = at + 56 + pieces.len() as u64 + 8;
    block.extend([0, 0, 0, 0, end].map(u64::to_le_bytes).as_flattened());
    block.extend(pieces);
    block.extend(header(0xffff, 8));
    block
}

fn header(kind: u16, bytes: u16) -> Vec<u8> {
    let mut header = [kind, bytes].map(u16::to_le_bytes).as_flattened().to_vec();
    header.extend([0; 4]);
    header
}

/// The measured start, with the hand-off block in its section.
fn start(image: &[u8]) -> Vec<LaunchStep> {
    let tdvf = Tdvf::parse(image).unwrap();
    let sections = tdvf.sections();
    let low = sections
        .iter()
        .filter(|section| section.memory_address < MEMORY);
    let mut accepted: Vec<_> = low
        .map(|section| {
            (
                section.memory_address,
                section.memory_address + section.memory_size,
            )
        })
        .collect();
    accepted.sort_unstable();
    let is_block = |section: &kvm_ops_tdvf::Section| section.kind == SectionKind::TdHob;
    let number = sections.iter().position(is_block).unwrap();
    let block = hand_off_block(sections[number].memory_address, &accepted);
    let mut launch = tdvf.launch();
    launch.fill(number, block).unwrap();
    let page = |page: PageAdd<'_>| LaunchPage {
        gpa: Gpa::new(page.gpa),
        contents: Box::new(*page.contents),
        kind: InitialPageKind::Unmeasured,
    };
    let step = |step: Step<'_>| match step {
        Step::Add(added) => page(added).into(),
        Step::Measure(added) => LaunchStep::Measure(Gpa::new(added.gpa)),
    };
    launch.steps(Order::TwoPass).map(step).collect()
}

/// The least of a Q35 that the firmware needs beside the serial port: configuration space of the memory controller
/// (8086:29c0) and of the LPC bridge (8086:2918), the power-management timer, and the APIC's MSRs that are the host's.
struct Q35 {
    devices: Devices,
    console: ConsoleSink,
    /// Function and register to what was written.
    written: Mutex<BTreeMap<(u32, u32), u32>>,
    /// The address in port 0xcf8.
    address: AtomicU32,
    timer: AtomicU32,
    prompted: AtomicBool,
}

const HOST_BRIDGE: u32 = 0;
const LPC_BRIDGE: u32 = 0x1f << 11;
const ECAM: u64 = 0xe000_0000;
const APIC_BASE: u32 = 0x1b;

impl Q35 {
    fn read(&self, function: u32, register: u32) -> u32 {
        match (function, register) {
            (HOST_BRIDGE, 0) => 0x29c0_8086,
            (HOST_BRIDGE, 8) => 0x0600_0000,
            (LPC_BRIDGE, 0) => 0x2918_8086,
            (LPC_BRIDGE, 8) => 0x0601_0000,
            // More functions.
            (LPC_BRIDGE, 0xc) => 0x80_0000,
            // No base addresses, no ROM.
            (HOST_BRIDGE | LPC_BRIDGE, 0x10..=0x24 | 0x30) => 0,
            (HOST_BRIDGE | LPC_BRIDGE, _) => {
                let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
                written.get(&(function, register)).copied().unwrap_or(0)
            }
            _ => u32::MAX,
        }
    }

    fn write(&self, function: u32, register: u32, offset: usize, data: &[u8]) {
        let mut value = self.read(function, register).to_le_bytes();
        value[offset..]
            .iter_mut()
            .zip(data)
            .for_each(|(to, from)| *to = *from);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.insert((function, register), u32::from_le_bytes(value));
    }

    /// An access to a register by its address: bus, device, function, register.
    fn configure(&self, address: u32, exit: &mut ExitContext<'_>, write: bool) {
        let (function, register) = (address & 0xff_ff00, address & 0xfc);
        let offset = (address & 3) as usize;
        if write {
            return self.write(function, register, offset, exit.data());
        }
        let value = self.read(function, register) >> (8 * offset);
        put(exit, value);
    }
}

/// Answers a read.
fn put(exit: &mut ExitContext<'_>, value: u32) {
    let bytes = value.to_le_bytes();
    exit.data()
        .iter_mut()
        .zip(bytes)
        .for_each(|(to, from)| *to = from);
}

impl ExitHandler for Q35 {
    fn handle(&self, exit: &mut ExitContext<'_>) -> Flow {
        // Bus, device and function are from bit 20 on there, and from bit 16 on in port 0xcf8.
        let ecam = |gpa: Gpa| {
            let at = gpa.get().wrapping_sub(ECAM) as u32;
            at >> 12 << 8 | at & 0xff
        };
        match exit.exit() {
            Exit::IoOut { port: 0xcf8, .. } => {
                let bytes = exit.data().try_into().unwrap_or_default();
                self.address
                    .store(u32::from_le_bytes(bytes), Ordering::Relaxed);
            }
            Exit::IoIn { port: 0xcf8, .. } => put(exit, self.address.load(Ordering::Relaxed)),
            Exit::IoIn { port, .. } | Exit::IoOut { port, .. } if port & !3 == 0xcfc => {
                let write = matches!(exit.exit(), Exit::IoOut { .. });
                let address = self.address.load(Ordering::Relaxed) & 0xff_fffc;
                self.configure(address | u32::from(port & 3), exit, write);
            }
            Exit::MmioRead { gpa, .. } if gpa.get() >> 28 == ECAM >> 28 => {
                self.configure(ecam(gpa), exit, false);
            }
            Exit::MmioWrite { gpa, .. } if gpa.get() >> 28 == ECAM >> 28 => {
                self.configure(ecam(gpa), exit, true);
            }
            Exit::MmioRead { .. } => put(exit, u32::MAX),
            // The power-management timer counts as it is read.
            Exit::IoIn { port: 0x608, .. } => {
                let ticks = self.timer.fetch_add(500, Ordering::Relaxed);
                put(exit, ticks & 0xff_ffff);
            }
            Exit::IoIn {
                port: 0x3f8..=0x3ff,
                ..
            }
            | Exit::IoOut {
                port: 0x3f8..=0x3ff,
                ..
            } => {
                let flow = self.devices.handle(exit);
                if flow == Flow::Continue && self.console.text().contains(PROMPT) {
                    self.prompted.store(true, Ordering::Relaxed);
                    return Flow::Stop;
                }
                return flow;
            }
            // The data of QEMU's configuration device, which has no files: all bits set would be four billion.
            Exit::IoIn { port: 0x511, .. } => put(exit, 0),
            Exit::IoIn { .. } => put(exit, u32::MAX),
            Exit::ReadMsr { index } => {
                let value = if index == APIC_BASE { 0xfee0_0d00 } else { 0 };
                exit.answer(Answer::Msr(value)).unwrap();
            }
            _ => {}
        }
        Flow::Continue
    }
}

#[test]
fn tdvf_runs_from_its_reset_vector_to_the_boot_manager() {
    let named = std::env::var("KVM_OPS_TDVF").ok();
    let path = named
        .as_deref()
        .unwrap_or("/usr/share/ovmf/OVMF.inteltdx.ms.fd");
    let Some(path) = support::file(path) else {
        return;
    };
    let image = std::fs::read(path).unwrap();
    let host = SimHost::new(Vendor::Intel);
    // The firmware handles the #VE of pages that it has not accepted.
    let params = TdParams {
        attributes: 0,
        ..TdParams::default()
    };
    let config = MachineConfig::new()
        .kind(Kind::Of(Tech::Tdx))
        .memory(MEMORY)
        .enc(EncParams::Td(Box::new(params)))
        .launch(start(&image));
    let mut machine = Machine::build(&host, config).unwrap();
    let console = ConsoleSink::capture();
    let q35 = Q35 {
        devices: machine.devices(console.clone()),
        console: console.clone(),
        written: Mutex::default(),
        address: AtomicU32::new(0),
        timer: AtomicU32::new(0),
        prompted: AtomicBool::new(false),
    };
    // Half a billion instructions, and the processor is not optimised in a test.
    let limits = RunLimits::none().deadline(Duration::from_secs(300));
    let report = machine.run(&q35, limits).unwrap();
    let prompted = q35.prompted.load(Ordering::Relaxed);
    assert!(prompted, "{}\n{report:?}", console.text());
    assert_eq!(report.end, End::Handler);
    eprintln!(
        "{} instructions in {:?}",
        host.instructions(),
        report.elapsed
    );
    let freed = machine.destroy();
    assert!(freed.is_clean(), "{freed:?}");
}

#[test]
fn the_hand_off_block_describes_all_memory_once_and_says_where_it_ends() {
    let block = hand_off_block(0x9000, &[(0x1000, 0x3000), (0x9000, 0xb000)]);
    let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().unwrap());
    assert_eq!(word(48), 0x9000 + block.len() as u64);
    let mut next = 0;
    for piece in block[56..block.len() - 8].chunks(48) {
        let number = |at: usize| u64::from_le_bytes(piece[at..at + 8].try_into().unwrap());
        assert_eq!((piece[0], number(32)), (3, next));
        next += number(40);
    }
    assert_eq!(next, MEMORY);
    assert_eq!(block[block.len() - 8..], [0xff, 0xff, 8, 0, 0, 0, 0, 0]);
}
