//! Ends of trust domains whose kernels go wrong: each is told, with the place where the processor stood in the log, and
//! everything is given back.
#![cfg(target_arch = "x86_64")]

#[path = "support/log.rs"]
mod log;
mod support;
#[path = "support/td_kernel.rs"]
mod td_kernel;

use std::time::Duration;

use iced_x86::code_asm::*;
use kvm_ops::sim::SimHost;
use kvm_ops::{Kind, Tech, Vendor};
use kvm_ops_machine::{ConsoleSink, End, Image, Machine, MachineConfig, RunLimits, RunReport};
use log::{has, log_of};
use td_kernel::*;

/// Runs a kernel for at most half a second, and gives everything back.
fn run(image: Image) -> (RunReport, String) {
    let host = SimHost::new(Vendor::Intel);
    let config = MachineConfig::new().kind(Kind::Of(Tech::Tdx));
    let mut machine = Machine::build(&host, config.memory(16 << 20).image(image)).unwrap();
    let console = ConsoleSink::capture();
    let limits = RunLimits::none().deadline(Duration::from_millis(500));
    let devices = machine.devices(console.clone());
    let report = machine.run(&devices, limits).unwrap();
    let freed = machine.destroy();
    assert!(freed.is_clean(), "{freed:?}");
    assert_eq!((freed.keys_freed, host.live_vms()), (1, 0));
    (report, console.text())
}

/// Prints, and then makes an access that the host would have to emulate.
const MAKES_VE: Part = |a| {
    print(a, "up")?;
    a.out(0x80, al)?;
    print(a, "not here")
};

/// The value of a field in a line of the log that has these words.
fn number(log: &[String], words: &str, field: &str) -> u64 {
    let line = log.iter().find(|line| line.contains(words)).expect(words);
    let (_, value) = line.split_once(&format!("{field}=0x")).expect(line);
    let digits = value.split(|c: char| !c.is_ascii_hexdigit()).next();
    u64::from_str_radix(digits.unwrap(), 16).expect(line)
}

#[test]
fn a_kernel_that_loops_in_ve_is_stopped_and_the_log_says_where() {
    // It fetches the information, and returns to the instruction that raised it.
    let handler: Part = |a| {
        a.mov(eax, VEINFO_GET)?;
        a.tdcall()?;
        a.iretq()
    };
    let mut ended = None;
    let log = log_of(|| ended = Some(run(kernel(MAKES_VE, &[(VE, handler)]))));
    let (report, text) = ended.unwrap();
    assert_eq!((text.as_str(), &report.end), ("up", &End::Deadline));
    assert!(!report.is_failure());
    let gone = "the processor of a TD's vCPU is gone";
    let rip = number(&log, gone, "rip");
    assert!((MAIN..PUTC).contains(&rip), "{rip:#x}");
    assert_eq!(number(&log, gone, "cr3") & 0xfff, 0);
}

#[test]
fn a_ve_in_the_handler_of_ve_is_a_triple_fault_and_the_log_has_place_stack_and_table() {
    // It makes the same access before it has fetched the information: a double fault, which has no handler.
    let handler: Part = |a| a.out(0x80, al);
    let mut ended = None;
    let log = log_of(|| ended = Some(run(kernel(MAKES_VE, &[(VE, handler)]))));
    let (report, text) = ended.unwrap();
    assert_eq!((text.as_str(), &report.end), ("up", &End::TripleFault));
    assert!(report.is_failure());
    let words = "triple fault: the guest has no handler for an exception";
    has(&log, &["ERROR", words, "technology=\"tdx\" vcpu=0"]);
    assert_eq!(number(&log, words, "rip"), HANDLERS);
    assert_eq!(number(&log, words, "idt"), IDT);
    assert_ne!(number(&log, words, "rsp"), 0);
}

#[test]
fn a_kernel_without_a_handler_of_ve_is_a_triple_fault_at_the_instruction() {
    let mut ended = None;
    let log = log_of(|| ended = Some(run(kernel(MAKES_VE, &[]))));
    let (report, text) = ended.unwrap();
    assert_eq!((text.as_str(), &report.end), ("up", &End::TripleFault));
    let rip = number(&log, "triple fault: the guest", "rip");
    assert!((MAIN..HANDLERS).contains(&rip), "{rip:#x}");
}
