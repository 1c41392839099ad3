//! Privileged behaviour against KVM, on hosts whose KVM runs ring 0 natively.
//!
//! Each case is one instruction in a small machine of 64-bit mode: whatever the instruction does, the machine comes to a HLT,
//! at an address that tells the exception. The case runs on the processor of this crate and on a vCPU of `/dev/kvm`, with
//! the CPUID features that both have, and everything that can be seen is compared: why it stopped, all registers, the MSRs that
//! the cases write, and memory with accessed bits and stack frames.
//!
//! Where there is no such KVM, the cases run on this processor alone, and the test says that nothing was compared.
//! `KVM_OPS_CPU_KVM=any` compares with any `/dev/kvm` (one that emulates ring 0 tests its emulator as well).
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod cases;
#[path = "../common/mod.rs"]
mod common;
mod compare;
mod machine;
mod ours;
mod theirs;

use std::collections::BTreeMap;

use cases::Case;
use machine::Stop;

/// Differences of one instruction that a failing test prints.
const SHOWN: usize = 3;

fn compare_all(group: &str, cases: impl Iterator<Item = Case>) {
    let mut kvm = theirs::Kvm::find();
    if let Err(reason) = &kvm {
        println!("{group}: not compared: {reason}");
    }
    let cpuid = kvm
        .as_ref()
        .map_or_else(|_| ours::cpuid(), theirs::Kvm::cpuid);
    let (mut compared, mut different, mut refused) = (0, 0, Vec::new());
    let mut by_instruction = BTreeMap::<String, Vec<String>>::new();
    for case in cases {
        let ours = ours::run(&case, &cpuid);
        assert_ne!(ours.stop, Stop::Budget, "{} does not end", case.name);
        let Ok(kvm) = &mut kvm else { continue };
        match kvm.run(&case) {
            Some(theirs) => {
                compared += 1;
                if let Some(text) = compare::difference(&ours, &theirs) {
                    different += 1;
                    let instruction = case.name.split_once(", ").map_or("", |(name, _)| name);
                    let of_it = by_instruction.entry(instruction.to_owned()).or_default();
                    of_it.push(format!("{}: {text}", case.name));
                }
            }
            None => refused.push(case.name),
        }
    }
    println!(
        "{group}: {compared} cases compared, {different} differences, {} not executed by KVM",
        refused.len()
    );
    for name in refused.iter().take(SHOWN) {
        println!("  not executed: {name}");
    }
    for (instruction, texts) in &by_instruction {
        println!("  {instruction}: {} differences", texts.len());
        for text in texts.iter().take(SHOWN) {
            println!("    {text}");
        }
    }
    assert_eq!(different, 0, "differences from KVM");
}

#[test]
fn descriptors_of_every_type_load_and_branch_as_on_kvm() {
    compare_all("descriptors", cases::descriptors::all());
}

#[test]
fn gates_of_every_type_deliver_as_on_kvm() {
    compare_all("gates", cases::gates::all());
}

#[test]
fn pages_of_every_right_fault_as_on_kvm() {
    compare_all("pages", cases::pages::all());
}

#[test]
fn system_instructions_and_registers_behave_as_on_kvm() {
    compare_all("system", cases::system::all());
}
