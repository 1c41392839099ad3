//! The table of `main.c`'s operations against the recorded reference, and the answers that are
//! generated from it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use kvm_ops::{
    Arc, CpuidEntry, DescTable, Error, Exception, Exit, Fate, Kick, MAIN_C, Result, Segment,
    SegmentName, VCPU_ANSWERS, VM_ANSWERS, VcpuId, VcpuOps,
};

/// A row of the reference: class, and the constant of a class C row.
fn reference() -> BTreeMap<&'static str, (char, &'static str)> {
    include_str!("vectors/ops/main_c.csv")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .skip(1)
        .map(|line| {
            let mut cells = line.split(',');
            let mut cell = || cells.next().expect("three cells and more");
            (cell(), (cell().chars().next().expect("a class"), cell()))
        })
        .collect()
}

#[test]
fn every_operation_of_the_reference_is_in_the_table_with_its_class() {
    let reference = reference();
    assert_eq!(reference.len(), 92);
    let names: BTreeSet<_> = MAIN_C.iter().map(|op| op.name).collect();
    assert_eq!(names.len(), MAIN_C.len(), "no name stands twice");
    for op in MAIN_C {
        let (class, _) = reference
            .get(op.name)
            .unwrap_or_else(|| panic!("{} is unknown", op.name));
        assert_eq!(op.class.letter(), *class, "{}", op.name);
    }
    let asked = reference
        .values()
        .filter(|(class, _)| matches!(class, 'B' | 'D'))
        .count();
    assert_eq!(
        (asked, reference.len() - asked),
        (30, 62),
        "as counted in main.c"
    );
}

/// The names of the methods that a trait's text declares.
fn methods(of: &str) -> BTreeSet<String> {
    let text = include_str!("../ops/src/backend_enum.rs");
    let from = text.find(&format!("pub trait {of}:")).expect("the trait");
    let body = &text[from..];
    let end = body[1..].find("pub trait ").map_or(body.len(), |at| at + 1);
    body[..end]
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("fn "))
        .map(|rest| rest.split('(').next().expect("a name").to_owned())
        .collect()
}

#[test]
fn every_operation_is_a_method_that_exists_or_says_why_it_is_none() {
    let (vm, vcpu) = (methods("VmOps"), methods("VcpuOps"));
    for op in MAIN_C {
        match op.fate {
            Fate::Vm(method) => assert!(vm.contains(method), "{} -> {method}", op.name),
            Fate::Vcpu(method) => assert!(vcpu.contains(method), "{} -> {method}", op.name),
            Fate::Backend(method) => assert_eq!(method, "create_vcpu"),
            Fate::Host(why) | Fate::LeftOut(why) => {
                assert!(why.len() > 20 && !why.ends_with('.'), "{}: {why}", op.name);
            }
        }
    }
}

#[test]
fn a_fixed_answer_is_generated_for_exactly_the_methods_whose_answer_is_fixed() {
    let generated: BTreeMap<_, _> = VCPU_ANSWERS
        .iter()
        .chain(VM_ANSWERS)
        .map(|row| (row.method, row.class))
        .collect();
    let mut expected = BTreeMap::new();
    for op in MAIN_C {
        if let (Fate::Vm(method) | Fate::Vcpu(method), 'N' | 'C' | 'Z' | 'W') =
            (op.fate, op.class.letter())
        {
            expected.insert(method, op.class);
        }
    }
    assert_eq!(generated, expected);
}

/// A vCPU that answers nothing itself.
struct Protected;

impl VcpuOps for Protected {
    kvm_ops::protected_vcpu_answers!();

    fn id(&self) -> VcpuId {
        VcpuId(0)
    }

    fn vcpu_run(&mut self) -> Result<Exit<'_>> {
        Ok(Exit::Shutdown)
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        struct Nobody;
        impl Kick for Nobody {
            fn kick(&self) {}
        }
        Arc::new(Nobody)
    }

    fn vcpu_reset(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }
}

/// What a method answered, in the words of the reference: a constant, `zero`, `nothing`.
fn answer(method: &str) -> String {
    let mut td = Protected;
    let nothing = |result: Result<()>| result.map(|()| "nothing".to_owned()).unwrap();
    let number = |value: u64| value.to_string();
    match method {
        "set_cpuid" => nothing(td.set_cpuid(&[CpuidEntry::default()])),
        // main.c answers 0 for set_efer, that is, success.
        "set_efer" => td.set_efer(u64::MAX).map(|()| number(0)).unwrap(),
        "get_segment_base" => number(td.get_segment_base(SegmentName::Cs).unwrap()),
        "get_segment" => zero(td.get_segment(SegmentName::Ss).unwrap() == Segment::default()),
        "set_segment" => nothing(td.set_segment(SegmentName::Cs, &Segment::default())),
        "get_cpl" => number(td.get_cpl().unwrap().into()),
        "get_cs_db_l_bits" => zero(td.get_cs_db_l_bits().unwrap() == (false, false)),
        "is_valid_cr0" => td.is_valid_cr0(u64::MAX).to_string(),
        "is_valid_cr4" => td.is_valid_cr4(u64::MAX).to_string(),
        "set_cr0" => nothing(td.set_cr0(u64::MAX)),
        "set_cr4" => nothing(td.set_cr4(u64::MAX)),
        "get_idt" => zero(td.get_idt().unwrap() == DescTable::default()),
        "set_idt" => nothing(td.set_idt(DescTable { base: 1, limit: 1 })),
        "get_gdt" => zero(td.get_gdt().unwrap() == DescTable::default()),
        "set_gdt" => nothing(td.set_gdt(DescTable { base: 1, limit: 1 })),
        "set_dr7" => nothing(td.set_dr7(u64::MAX)),
        "get_rflags" => number(td.get_rflags().unwrap()),
        "set_rflags" => nothing(td.set_rflags(u64::MAX)),
        "get_if_flag" => td.get_if_flag().unwrap().to_string(),
        "set_guest_debug" => nothing(td.set_guest_debug(true, true)),
        "inject_irq" => nothing(td.inject_irq(255)),
        "inject_exception" => nothing(td.inject_exception(Exception {
            vector: 255,
            error: None,
        })),
        "cancel_injection" => nothing(td.cancel_injection()),
        "nmi_allowed" => td.nmi_allowed().unwrap().to_string(),
        "get_nmi_mask" => td.get_nmi_mask().unwrap().to_string(),
        "set_nmi_mask" => nothing(td.set_nmi_mask(true)),
        "enable_irq_window" => nothing(td.enable_irq_window()),
        "get_interrupt_shadow" => number(td.get_interrupt_shadow().unwrap().into()),
        "set_interrupt_shadow" => nothing(td.set_interrupt_shadow(3)),
        "write_tsc_offset" => nothing(td.write_tsc_offset(1)),
        "write_tsc_multiplier" => nothing(td.write_tsc_multiplier(1)),
        "setup_mce" => nothing(td.setup_mce(1)),
        other => panic!("{other} has a fixed answer that this test does not call"),
    }
}

fn zero(is_zero: bool) -> String {
    if is_zero {
        "zero".to_owned()
    } else {
        "not zero".to_owned()
    }
}

#[test]
fn each_generated_vcpu_answer_is_the_references_constant_zero_or_nothing() {
    let reference = reference();
    let mut compared = 0;
    for op in MAIN_C {
        let Fate::Vcpu(method) = op.fate else {
            continue;
        };
        let (class, constant) = reference[op.name];
        let wanted = match class {
            'C' => constant,
            'Z' => "zero",
            'N' => "nothing",
            _ => continue,
        };
        assert_eq!(answer(method), wanted, "{}", op.name);
        compared += 1;
    }
    // `get_cpl` answers for two operations of main.c.
    assert_eq!(compared, VCPU_ANSWERS.len() + 1);
}

#[test]
fn what_a_td_is_asked_and_has_no_answer_for_is_refused_by_name() {
    let mut td = Protected;
    let errors: [(Result<u64>, &str); 4] = [
        (td.get_msr(0), "get_msr"),
        (td.inject_nmi().map(|()| 0), "inject_nmi"),
        (
            td.load_mmu_pgd(kvm_ops::Hpa::new(0), 4).map(|()| 0),
            "load_mmu_pgd",
        ),
        (td.get_regs().map(|regs| regs.rax), "get_regs"),
    ];
    for (error, name) in errors {
        match error {
            Err(Error::NoOp(op)) => assert_eq!(op.0, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// docs/ops.md as the table says it.
fn ops_page() -> String {
    let mut page = String::from(
        "# The operations of main.c\n\n\
         Linux `arch/x86/kvm/vmx/main.c` (7.1) wraps 92 operations with \"if it is a TD then tdx, else vmx\". Each is\n\
         listed here: the method that it is in this library, or why an embedder does not need it. The class tells what\n\
         main.c answers for a TD: **B** both back ends are called, **D** the call goes to the TD back end, **N** nothing\n\
         happens, **C** a constant, **Z** zeros, **W** refused. What is N, C, Z or W and a method here is generated from\n\
         one table (`ops/src/answers.rs`) by `protected_vcpu_answers!` and `protected_vm_answers!`.\n\n\
         This page is written by `KVM_OPS_BLESS=1 cargo test --test main_c`, and the same test compares it.\n\n\
         | operation | class | here |\n|---|---|---|\n",
    );
    for op in MAIN_C {
        let here = match op.fate {
            Fate::Vm(method) => format!("`VmOps::{method}`"),
            Fate::Vcpu(method) => format!("`VcpuOps::{method}`"),
            Fate::Backend(method) => format!("`Backend::{method}`"),
            Fate::Host(why) => format!("host: {why}"),
            Fate::LeftOut(why) => format!("left out: {why}"),
        };
        writeln!(page, "| {} | {} | {here} |", op.name, op.class.letter()).unwrap();
    }
    page
}

#[test]
fn the_page_of_operations_says_what_the_table_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/ops.md");
    if std::env::var_os("KVM_OPS_BLESS").is_some() {
        std::fs::write(path, ops_page()).unwrap();
    }
    assert!(
        std::fs::read_to_string(path).unwrap() == ops_page(),
        "docs/ops.md is not what the table says: run `KVM_OPS_BLESS=1 cargo test --test main_c`"
    );
}
